# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, requests that do not fit, nonsense, and a server that is stopped at work.

One server of a small random model serves the whole file. Its cache is too small for the requests
it admits, so whatever happens here happens among preemptions. In mode `exact` the judge is simple:
afterwards every prompt gets the tokens and log-probabilities that it got from the idle server.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.served import NAME, Served, serving

from .fuzz import random_body
from .harness import PLAIN, Answer, varied_prompts
from .models import VOCAB_SIZE, make_model

NUM_BLOCKS = 17  # 16 of 32 tokens, and vLLM's own
CACHE_TOKENS = 512
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
FLAGS = (
    "--kv-cache-dtype", "fibquant_2bit", "--dtype", "float32", "--enforce-eager",
    "--max-model-len", str(CACHE_TOKENS), "--max-num-seqs", "8", "--block-size", "32",
    "--kv-cache-memory-bytes", str(64 << 20),
    "--uvicorn-log-level", "warning",
    "--additional-config", json.dumps({"fibquant": PLAIN}),
)  # fmt: skip


def body_of(prompt: list[int], num_tokens: int = 24, **changes) -> dict:
    return {
        "model": NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0,
        "logprobs": 1, "ignore_eos": True, "return_token_ids": True, **changes,
    }  # fmt: skip


def ask(server: Served, prompt: list[int], num_tokens: int = 24) -> Answer:
    status, content = server.ask("/v1/completions", body_of(prompt, num_tokens))
    assert status == 200, content
    choice = json.loads(content)["choices"][0]
    return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))


def ask_together(server: Served, prompts: list[list[int]], num_tokens: int = 24) -> list[Answer]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, num_tokens), prompts))


def seconds_until(condition, limit_s: float) -> float:
    """How long it took until `condition()`; fails after `limit_s`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit_s, f"not after {limit_s} s"
        time.sleep(0.1)
    return time.monotonic() - begin


def is_idle(server: Served) -> bool:
    metrics = server.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return not any(metrics[f"vllm:{name}"] for name in names)


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    model = make_model("llama", model_folder)
    flags = (*FLAGS, "--num-gpu-blocks-override", str(NUM_BLOCKS))
    log_path = tmp_path_factory.mktemp("faults") / "log"
    with serving(model, *flags, log_path=log_path, environment=ONE_THREAD) as server:
        yield server


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return varied_prompts(8, VOCAB_SIZE, longest=100, shortest=80, seed=21)


@pytest.fixture(scope="module")
def alone(server, prompts) -> list[Answer]:
    """What the idle server answers."""
    return [ask(server, prompt) for prompt in prompts]


@pytest.fixture(autouse=True)
def unharmed(server, prompts, alone):
    """After every test nothing is left in the cache, and answers are what they were."""
    yield
    if server.process.poll() is None:
        seconds_until(lambda: is_idle(server), 60)
        assert [ask(server, prompt).bits for prompt in prompts] == [a.bits for a in alone]


def test_everything_preempts(server, prompts):
    """Eight requests of up to 164 tokens in a cache for 512."""
    alone = [ask(server, prompt, 64) for prompt in prompts]
    before = server.metrics()["vllm:num_preemptions"]
    # A busy machine may let requests arrive too far apart to meet in the cache.
    for _ in range(6):
        together = ask_together(server, prompts, 64)
        assert [a.bits for a in together] == [a.bits for a in alone]
        count = server.metrics()["vllm:num_preemptions"] - before
        if count > 0:
            break
    print(f"\n{count:.0f} preemptions of {len(prompts)} requests")
    assert count > 0


def test_clients_that_hang_up(server, prompts):
    """Their requests end, and their blocks are free again."""
    left = []
    for prompt in prompts * 2:
        body = body_of(prompt, 400, stream=True)
        left.append(server.open("/v1/completions", body))
    for _, response in left[:4]:
        assert response.readline().startswith(b"data: ")
    assert server.metrics()["vllm:kv_cache_usage_perc"] > 0.5
    for connection, response in left:
        response.close()
        connection.close()
    seconds = seconds_until(lambda: is_idle(server), 60)
    print(f"\n{len(left)} clients hung up: the cache was empty after {seconds:.1f} s")


def test_requests_that_do_not_fit(server):
    """A longer prompt than fits: refused, with both lengths. An answer that ends at the limit."""
    long = varied_prompts(1, VOCAB_SIZE, longest=CACHE_TOKENS, shortest=CACHE_TOKENS)[0]
    long = (long * CACHE_TOKENS)[: CACHE_TOKENS + 1]
    status, content = server.ask("/v1/completions", body_of(long, 1))
    assert status == 400
    assert f"{CACHE_TOKENS} tokens" in content.decode()
    assert f"{CACHE_TOKENS + 1} input tokens" in content.decode()
    answer = ask(server, long[:500], 100)
    assert len(answer.tokens) == CACHE_TOKENS - 500
    crowd = ask_together(server, [long[:500]] * 3, 100)
    assert [a.bits for a in crowd] == [answer.bits] * 3


def fuzz(server: Served, count: int) -> dict[int, int]:
    """How often each status came back for `count` random requests, eight at a time.

    Fails on the first that is not an answer or a refusal, or that takes a minute.
    """

    def send(number: int) -> tuple[int, bytes, bytes]:
        body = random_body(number, VOCAB_SIZE)
        return (*server.ask("/v1/completions", body, timeout=60), body)

    statuses: dict[int, int] = {}
    with ThreadPoolExecutor(8) as pool:
        for status, content, body in pool.map(send, range(count)):
            statuses[status] = statuses.get(status, 0) + 1
            assert status in (200, 400, 422), f"{status} for {body!r}: {content[:500]!r}"
    assert statuses[200] > count / 10
    assert statuses[400] > count / 10
    return statuses


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_sampling_parameters(server, count):
    begin = time.monotonic()
    statuses = fuzz(server, count)
    print(f"\n{count} random requests: {statuses}, {time.monotonic() - begin:.0f} s")


def test_stopped_at_work(server, prompts):
    """SIGTERM while it generates. Last in this file: it stops the server of the others."""
    open_requests = [
        server.open("/v1/completions", body_of(prompt, 400, stream=True)) for prompt in prompts[:4]
    ]
    for _, response in open_requests:
        assert response.readline().startswith(b"data: ")
    processes = server.processes()
    server.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    ended = []
    for connection, response in open_requests:
        with contextlib.suppress(Exception):  # an answer that breaks off is an end as well
            ended.append(response.read()[-300:])
        connection.close()
    status = server.process.wait(60)
    print(f"\nended with {status} after {time.monotonic() - begin:.1f} s; clients got: {ended[:1]}")
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, "no process may stay behind"
    assert not server.is_healthy()
