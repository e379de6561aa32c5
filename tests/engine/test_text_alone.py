# SPDX-License-Identifier: Apache-2.0
"""Texts of models whose classes vLLM imports with an image processor.

In processes of their own: the processors' imports are stand-ins (`stand_in/torchvision`), which
must not be seen by other tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .architectures import SHAPES
from .models import make_model
from .test_server import start, wait_until_healthy
from .text_alone import gemma3_images

HERE = Path(__file__).parent
BOUNDS = {"gemma3-images": 1e-4, "qwen2.5-vl": 1e-3, "qwen3.5": 0.1}
"""As in test_models.py: float32, long biases, and bfloat16 with linear attention."""
STAND_IN = {"PYTHONPATH": str(HERE / "stand_in")}
CHAT = {"model": "gemma", "max_tokens": 4}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhf"
    "DwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.mark.slow
@pytest.mark.parametrize("shape", BOUNDS)
def test_texts_are_stock_attention(tmp_path, shape):
    command = [sys.executable, "-m", "tests.engine.text_alone", shape, str(tmp_path)]
    run = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, **STAND_IN},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("DIFFERENCE ")]
    _, other_tokens, largest = line.split()
    assert (int(other_tokens), float(largest) < BOUNDS[shape]) == (0, True), line


@pytest.mark.slow
def test_a_server_answers_texts_and_refuses_images_one_by_one(tmp_path, monkeypatch):
    """Gemma 3 as it is given: no flag about images."""
    monkeypatch.setitem(SHAPES, "gemma3-images", gemma3_images)
    monkeypatch.setenv("PYTHONPATH", STAND_IN["PYTHONPATH"])
    model = make_model("gemma3-images", tmp_path)
    template = "{% for m in messages %}w9 {% endfor %}"
    server = start(
        tmp_path / "log", model, "--kv-cache-dtype", "fibquant_2bit", "--max-model-len", "512",
        "--dtype", "float32", "--served-model-name", "gemma", "--enforce-eager",
        "--kv-cache-memory-bytes", str(64 << 20), "--chat-template", template,
    )  # fmt: skip
    try:
        wait_until_healthy(server)
        text = {"type": "text", "text": "w3 w4"}
        image = {"type": "image_url", "image_url": {"url": PIXEL}}
        assert asked(server, [text])[0] == 200
        status, told = asked(server, [text, image])
        assert (status, "multi-modal" in told.lower() or "image" in told) == (400, True), told
        assert asked(server, [text])[0] == 200
        assert "requests with image are refused, texts are served" in server.log
    finally:
        server.process.terminate()
        server.process.wait(30)


def asked(server, content) -> tuple[int, str]:
    body = {**CHAT, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()
