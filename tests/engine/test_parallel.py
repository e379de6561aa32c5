# SPDX-License-Identifier: Apache-2.0
"""API server, engine core and workers as processes; tensor, pipeline and data parallel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vllm_fibquant.keys.calibration import parse_calibration

from . import odd_rank
from .harness import PLAIN, Answer, largest_difference, varied_prompts
from .models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.slow

START_S = 300.0
PRESET = "fibquant_2bit"


class DidNotStart(Exception):
    """With the end of the server's output."""


@contextlib.contextmanager
def server(model: str, *flags: str, threads: str = "0"):
    """vLLM's own API server; yields its URL. `threads` has the cores of each rank.

    Raises:
        DidNotStart: it ended, or took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if "--additional-config" not in flags:
        flags = (*flags, "--additional-config", json.dumps({"fibquant": PLAIN}))
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--kv-cache-dtype", PRESET, "--dtype", "float32", "--max-model-len", "512",
        "--max-num-seqs", "8", "--block-size", "32",
        "--kv-cache-memory-bytes", str(64 << 20), *flags,
    ]  # fmt: skip
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE")
    }
    environment["VLLM_CPU_OMP_THREADS_BIND"] = threads
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    reader = ThreadPoolExecutor(1)
    reader.submit(lambda: lines.extend(process.stdout))
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise DidNotStart("".join(lines)[-20_000:])
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        reader.shutdown()


def ask(url: str, prompt: list[int], num_tokens: int = 6) -> Answer:
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0,
        "logprobs": 1, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice = json.load(response)["choices"][0]
    return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))


def ask_all(url: str, prompts: list[list[int]], at_once: int = 4) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: ask(url, prompt), prompts))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return varied_prompts(32, VOCAB_SIZE)


@pytest.fixture(scope="module")
def one_process(model_folder, prompts) -> list[Answer]:
    with server(make_model("llama", model_folder), "--enforce-eager") as url:
        return ask_all(url, prompts)


def test_tensor_parallel(model_folder, prompts, one_process):
    """Each rank holds one of the two KV heads. Sums over ranks round differently, no more."""
    flags = ("--enforce-eager", "--tensor-parallel-size", "2")
    with server(make_model("llama", model_folder), *flags, threads="0|1") as url:
        answers = ask_all(url, prompts)
    figures = largest_difference(one_process, answers)
    print("\ntensor parallel 2:", figures)
    assert figures[0] == 0
    assert figures[2] < 0.05


def test_pipeline_parallel(model_folder, prompts, one_process):
    """Compiled, as stock vLLM 0.32.0 needs for pipeline parallelism on CPUs."""
    flags = ("--pipeline-parallel-size", "2")
    with server(make_model("llama", model_folder), *flags, threads="0|1") as url:
        answers = ask_all(url, prompts)
    figures = largest_difference(one_process, answers)
    print("\npipeline parallel 2:", figures)
    assert figures[0] == 0
    assert figures[2] < 0.05


def test_data_parallel(model_folder, prompts, one_process):
    """Two engines, each with its own cache: whichever answers, the bits are the same."""
    flags = ("--enforce-eager", "--data-parallel-size", "2")
    with server(make_model("llama", model_folder), *flags, threads="0|1") as url:
        answers = ask_all(url, prompts)
    print("\ndata parallel 2:", largest_difference(one_process, answers))
    assert [a.bits for a in answers] == [a.bits for a in one_process]


@pytest.mark.parametrize(
    ("shape", "calibrate", "parallel"),
    [
        ("llama", "means", "--tensor-parallel-size"),
        ("llama", "transform", "--tensor-parallel-size"),
        ("qwen2", "none", "--tensor-parallel-size"),
        ("llama", "transform", "--pipeline-parallel-size"),
        ("qwen2", "none", "--pipeline-parallel-size"),
    ],
)
def test_calibration_and_layers(model_folder, prompts, tmp_path, shape, calibrate, parallel):
    """Two ranks measure what one process does, and both read layer 1's codes of another preset."""
    model, answers, files = make_model(shape, model_folder), [], []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.fqcal"
        options = {**PLAIN, "calibrate": calibrate, "layers": {"1": "fibquant_3bit"}}
        if calibrate != "none":
            options["calibration"] = str(path)
        flags = ["--worker-cls", "tests.engine.odd_rank.RandomTextWorker"]
        flags += ["--additional-config", json.dumps({"fibquant": options})]
        flags += [parallel, str(ranks)]
        if parallel == "--tensor-parallel-size":  # vLLM 0.32.0 compiles with pipelines alone
            flags.append("--enforce-eager")
        with server(model, *flags, threads="|".join(map(str, range(ranks)))) as url:
            answers.append(ask_all(url, prompts))
        if calibrate != "none":
            files.append(parse_calibration(path.read_bytes(), str(path)).layers)
    for name in files[0] if files else ():
        for a, b in zip(*(file[name].tensors for file in files), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    figures = largest_difference(*answers)
    print(f"\n{parallel} 2, {calibrate}", figures)
    assert figures[0] == 0
    assert figures[2] < 0.05


def test_ranks_with_other_codebooks(model_folder, tmp_path, monkeypatch):
    """One value of one codebook differs on rank 1: nobody serves, and the message says why."""
    from vllm_fibquant.codec import codebook

    (path,) = codebook.SHIPPED_DIR.glob("d64-k4n256-int8.fqcb")
    book = codebook.read_codebook(path)
    table = book.table.numpy().copy()
    table[7, 1] ^= 1
    other, content = codebook.make_codebook(book.spec, 64, table, book.scale, book.provenance)
    (tmp_path / path.name).write_bytes(content)
    monkeypatch.setenv(odd_rank.CODEBOOKS, str(tmp_path))
    flags = ["--enforce-eager", "--worker-cls", "tests.engine.odd_rank.OddRankWorker"]
    flags += ["--tensor-parallel-size", "2"]
    model = make_model("llama", model_folder)
    with pytest.raises(DidNotStart) as caught, server(model, *flags, threads="0|1"):
        pass
    told = str(caught.value)
    for side in ("keys'", "values'"):
        assert (
            f"{side} codebook k4n256 in int8 for head_dim 64: must be the same on every rank, got "
            f"{book.digest[:16]} on rank 0; {other.digest[:16]} on rank 1"
        ) in told
    assert "--kv-cache-dtype fibquant_2bit cannot be used here" in told
