# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant serve` as a user sees it: the OpenAI client, bad requests, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="starts vLLM's server")
openai = pytest.importorskip("openai", reason="talks to the server as its users do")

from vllm_fibquant.demo_model import MODEL_NAME, ensure_demo_model  # noqa: E402

START_LIMIT_S = 300
STOP_LIMIT_S = 30
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.engine


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)


def start(log_path: Path, *flags: str) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A user's environment: tests of engines in this process set variables of vLLM's.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    command = [sys.executable, "-m", "vllm_fibquant", "serve", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with open(log_path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    return Server(process, f"http://127.0.0.1:{port}", log_path)


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            pytest.fail(f"server ended with {server.process.returncode}:\n{server.log[-4000:]}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"server not healthy after {START_LIMIT_S} s:\n{server.log[-4000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    ensure_demo_model()
    server = start(tmp_path_factory.mktemp("server") / "log", "--max-model-len", "1024")
    try:
        wait_until_healthy(server)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGINT)
            try:
                server.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                server.process.kill()


def test_says_what_was_decided(server):
    line = next(line for line in server.log.splitlines() if line.startswith("vllm-fibquant:"))
    assert "--kv-cache-dtype fibquant" in line
    assert MODEL_NAME in line
    assert "FIBQUANT" in server.log, "vLLM must have registered the backend"


def test_models(server):
    assert [model.id for model in server.client().models.list()] == [MODEL_NAME]


def test_chat(server):
    answer = server.client().chat.completions.create(
        model=MODEL_NAME, messages=QUESTION, temperature=0, max_tokens=30
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 1


def test_chat_streaming_gives_the_same_text(server):
    arguments = {"model": MODEL_NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 30}
    whole = server.client().chat.completions.create(**arguments)
    chunks = list(server.client().chat.completions.create(**arguments, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > 2
    assert text == whole.choices[0].message.content


def test_request_without_a_model(server):
    """The README's curl line."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps({"messages": QUESTION, "max_tokens": 5}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        body = json.load(response)
    assert body["model"] == MODEL_NAME
    assert body["choices"][0]["message"]["content"]


def test_bad_requests_are_refused_and_harm_nobody(server):
    client = server.client()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL_NAME, messages=QUESTION, max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="context length"):
        long = [{"role": "user", "content": "word " * 3000}]
        client.chat.completions.create(model=MODEL_NAME, messages=long)
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=QUESTION, temperature=0, max_tokens=30
    )
    assert "Paris" in answer.choices[0].message.content


def test_interrupt_stops_it_cleanly(server):
    """Last in this file: it stops the server of the others."""
    import psutil

    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children, "the engine runs in a process of its own"
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(STOP_LIMIT_S) in (0, 130)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "no process may stay behind"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)
