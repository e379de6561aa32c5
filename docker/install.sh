#!/bin/sh
# The steps of the images' final stage, one word each, so that each can be a layer of its own:
#
#   install.sh system               Debian packages of the CPU image
#   install.sh python PYPROJECT     its Python packages, into $VENV, at the versions of PYPROJECT
#   install.sh user                 the user the server runs as, and the one place it may write
#   install.sh wheel DIRECTORY      this package; refuses an installation that does not run
#
# The CUDA image has vLLM already and needs the last two. Runs as root on Debian or Ubuntu.
#
#   VENV         the virtual environment `python` makes; its bin must come first in PATH
#   TORCH_INDEX  where pip finds PyTorch's CPU build; empty: the index pip is set up with
#   STATE        the directory of everything written: models fetched, compiled code, settings
set -eu

UID_GID=10001

usage() {
    echo "install.sh: the step must be system, python FILE, user or wheel DIRECTORY, got: $*" >&2
    exit 2
}

pip_install() {
    python3 -m pip --disable-pip-version-check install --no-cache-dir --root-user-action=ignore "$@"
}

install_system() {
    apt-get update
    # libnuma1: vLLM's CPU library is linked to it. g++ and python3-dev: torch.compile's CPU code
    # is compiled when the server starts, on CPUs where the launcher leaves compilation on.
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libnuma1 python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
}

# Prints one requirement per line: PyTorch's with `torch`, all others with `rest`.
requirements() {
    python3 - "$1" "$2" <<'PYTHON'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
pins = extras["cpu"] + extras["demo"]
torch = [pin for pin in pins if pin.startswith("torch==")]
if len(torch) != 1:
    sys.exit(f"install.sh: the cpu extra must pin torch once, got {torch}")
rest = [pin for pin in project["dependencies"] + pins if not pin.startswith("torch")]
print("\n".join(torch if sys.argv[2] == "torch" else rest))
PYTHON
}

install_python() {
    : "${VENV:?must be set for this step; see the Dockerfile}"
    [ -f "$1" ] || usage python "$1"
    python3 -m venv "$VENV"
    # PyTorch first: asked for alone, its CPU build is found; vLLM's requirement would decide else.
    pip_install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(requirements "$1" torch)"
    requirements "$1" rest > "$VENV/requirements.txt"
    pip_install --requirement "$VENV/requirements.txt"
    # The registry's torchvision does not load beside CPU PyTorch, and then breaks
    # `import transformers`. Text models need none of the three.
    if ! python3 -c 'import torchvision' 2>/dev/null; then
        python3 -m pip uninstall --yes torchvision torchaudio torchcodec
    fi
    python3 -c 'import transformers, vllm'
    # What was installed, for whoever must compare two images.
    python3 -m pip freeze > "$VENV/requirements.txt"
}

install_user() {
    : "${STATE:?must be set for this step; see the Dockerfile}"
    groupadd --gid "$UID_GID" fibquant
    useradd --uid "$UID_GID" --gid "$UID_GID" --home-dir "$STATE" --no-create-home \
        --shell /usr/sbin/nologin fibquant
    # A fresh named volume mounted here takes its owner and mode from this directory.
    install --directory --owner="$UID_GID" --group="$UID_GID" --mode=0750 "$STATE"
}

install_wheel() {
    [ -d "$1" ] || usage wheel "$1"
    pip_install --no-deps "$1"/vllm_fibquant-*.whl
    vllm-fibquant info
}

case "${1:-} $#" in
    "system 1") install_system ;;
    "python 2") install_python "$2" ;;
    "user 1") install_user ;;
    "wheel 2") install_wheel "$2" ;;
    *) usage "$@" ;;
esac
