# SPDX-License-Identifier: Apache-2.0
"""The CPU image as its operators meet it: built from its Dockerfile, run hardened, stopped.

No container engine is needed; see container.py. The base image is Debian made by debootstrap, and
what the Dockerfile installs is downloaded as for anyone else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.container import BASE, Container, Store, why_not
from vllm_fibquant import __version__
from vllm_fibquant.demo_model import MODEL_NAME, ensure_demo_model

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 600
STOP_LIMIT_S = 60
KEY = "a-key-of-this-test"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

CHAT = f"""
import json, sys, urllib.request
def ask(path, key={KEY!r}, **body):
    request = urllib.request.Request("http://127.0.0.1:8000" + path)
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", "Bearer " + key)
    data = json.dumps(body).encode() if body else None
    return urllib.request.urlopen(request, data, timeout=120)
QUESTION = [{{"role": "user", "content": "What is the capital of France?"}}]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("images"))
    try:
        store.make_base()
        store.build(
            ROOT, "docker/Dockerfile.cpu", "cpu",
            f"--build-arg=BASE={BASE}", "--build-arg=REVISION=of-a-test",
            # Where this machine's pip finds PyTorch, torch is looked for; else as by default.
            *(["--build-arg=TORCH_INDEX="] if os.environ.get("PIP_FIND_LINKS") else []),
        )  # fmt: skip
        yield store
    finally:
        store.remove()


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    """A server with the demo model that has answered nothing yet."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(ensure_demo_model(), models / MODEL_NAME)
    for path in (models, *models.rglob("*")):
        path.chmod(0o755)  # readable to the image's user, as the documents ask for
    container = Container(
        store, "cpu", tmp_path_factory.mktemp("server"), models, VLLM_API_KEY=KEY
    )  # fmt: skip
    try:
        container.start(f"/models/{MODEL_NAME}", "--max-model-len=1024", "--shutdown-timeout=30")
        time.sleep(2)
        assert not container.is_healthy(), "the health check passes before there is a server"
        container.wait_until_healthy(START_LIMIT_S)
        yield container
    finally:
        container.remove()


def output_of(container: Container, code: str) -> str:
    client = container.client(CHAT + code)
    out, err = client.communicate(timeout=120)
    assert client.returncode == 0, err + container.log[-4000:]
    return out


def test_description(store):
    config = store.config_of("cpu")
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["vllm-fibquant", "serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.revision"] == "of-a-test"


def test_process_1_is_the_unprivileged_server(server):
    status = server.run("cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == fields["Gid"].split() == ["10001"] * 4
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    command = server.run("cat", "/proc/1/cmdline").stdout.split("\0")
    assert command[1].endswith("/vllm-fibquant") and command[2] == "serve", command


def test_answers(server):
    models = json.loads(output_of(server, "print(ask('/v1/models').read().decode())"))
    assert [model["id"] for model in models["data"]] == [MODEL_NAME]
    code = "print(ask('/v1/chat/completions', messages=QUESTION, max_tokens=60).read().decode())"
    answer = json.loads(output_of(server, code))
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert "with --served-model-name" in server.log and "--kv-cache-dtype fibquant" in server.log


def test_asks_for_the_key(server):
    code = """
try: ask('/v1/models', key='another')
except urllib.error.HTTPError as error: print(error.code)
"""
    assert output_of(server, code).strip() == "401"
    assert "vllm:" in output_of(server, "print(ask('/metrics', key='').read().decode())")


def test_writes_to_its_volume_alone(server):
    """The root is read-only, even to root; and nothing of it has changed since before the start."""
    for command in (["touch", "/usr/file"], ["touch", "/etc/hosts"], ["touch", "/models/file"]):
        refused = server.run(*command, as_root=True)
        assert "Read-only file system" in refused.stderr, command
    assert server.run("touch", f"{server.volume}/file").returncode == 0
    assert server.files() == server.files_before
    assert (server.state / "file").stat().st_uid == 10001


def test_finishes_requests_before_it_stops(server):
    """SIGTERM while an answer is being written: it arrives whole, then the server ends with 0."""
    code = """
body = dict(messages=QUESTION, max_tokens=60, min_tokens=60, stream=True)
with ask('/v1/chat/completions', **body) as answer:
    for line in answer:
        print(line.decode().strip(), flush=True)
"""
    client = server.client(CHAT + code)
    assert client.stdout.readline().startswith("data: ")
    begin = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    out, err = client.communicate(timeout=STOP_LIMIT_S)
    assert out.strip().endswith("data: [DONE]"), out[-500:] + err
    assert '"finish_reason":"length"' in out
    assert server.process.wait(STOP_LIMIT_S) == 0, server.log[-4000:]
    assert time.monotonic() - begin < STOP_LIMIT_S


def test_stops_while_it_starts(store, tmp_path):
    """Process 1 without a handler of its own would ignore the signal."""
    container = Container(store, "cpu", tmp_path)
    try:
        container.start("/models/none-needed-yet")
        deadline = time.monotonic() + 60
        while "vllm serve with" not in container.log and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(container.pid, signal.SIGTERM)
        assert container.process.wait(20) == 128 + signal.SIGTERM, container.log
    finally:
        container.remove()


def test_cuda_dockerfile(store):
    """Its steps on a stand-in for vLLM's image: Python with vLLM, and no user of ours."""
    store.build(
        ROOT, "docker/Dockerfile.cpu", "stand-in", "--target=python", f"--build-arg=BASE={BASE}",
        *(["--build-arg=TORCH_INDEX="] if os.environ.get("PIP_FIND_LINKS") else []),
    )  # fmt: skip
    store.build(ROOT, "docker/Dockerfile.cuda", "cuda", "--build-arg=BASE=localhost/stand-in")
    cpu, cuda = store.config_of("cpu"), store.config_of("cuda")
    for field in ("User", "Entrypoint", "Volumes", "WorkingDir", "StopSignal", "Healthcheck"):
        assert cuda[field] == cpu[field], field
