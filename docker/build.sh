#!/bin/sh
# The builder stage of both images: makes a wheel of the package.
#
#   build.sh SOURCE OUT    SOURCE: the source tree, writable; OUT: where the wheel goes
#
# Runs as root on Debian or Ubuntu. What is there already (python3 with pip, a C++ compiler)
# is used; Debian's own packages are installed only where something is missing. Where nvcc is there
# (CUDACXX, on the PATH, or in /usr/local/cuda), the wheel also gets the CUDA library, for
# FIBQUANT_CUDA_ARCHS; without it a GPU is served with the Triton kernels.
set -eu

if [ $# -ne 2 ] || [ ! -f "$1/setup.py" ]; then
    echo "build.sh: arguments must be SOURCE OUT with SOURCE/setup.py, got: $*" >&2
    exit 2
fi
source=$1
out=$2

packages=
command -v g++ >/dev/null || packages="$packages g++"
python3 -m pip --version >/dev/null 2>&1 || packages="$packages python3 python3-pip"
if [ -n "$packages" ]; then
    apt-get update
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $packages
    rm -rf /var/lib/apt/lists/*
fi

PATH=$PATH:/usr/local/cuda/bin
if command -v "${CUDACXX:-nvcc}" >/dev/null; then
    export FIBQUANT_CUDA=1
else
    echo "build.sh: no nvcc, so the wheel has no CUDA library" >&2
fi

# An isolated build: pip fetches the setuptools that pyproject.toml asks for, and nothing else.
python3 -m pip wheel --no-deps --no-cache-dir --wheel-dir "$out" "$source"
