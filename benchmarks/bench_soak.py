# SPDX-License-Identifier: Apache-2.0
"""Memory of the server, and its answers, over minutes of mixed traffic.

A small cache is kept full: prompts of 20 to 900 tokens share prefixes, one in five clients hangs up
in the middle of its answer, and more requests come than fit, so that requests are preempted and
blocks evicted all the time. Every complete answer is compared, text and log-probabilities, with
the one that the same prompt got when the server had nothing else to do.

    nice -n 10 python -m benchmarks.bench_soak --minutes 20 --out docs/results/soak.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, append, model_or_demo
from benchmarks.served import NAME, Served, serving

NUM_PROMPTS = 24
NUM_TOKENS = 24
NUM_CLIENTS = 6
SAMPLE_S = 5.0
HANG_UP_SHARE = 0.2
CACHE_TOKENS = 2048
BLOCK_SIZE = 32


def prompts_of(seed: int) -> list[list[int]]:
    """Prompts in token ids; two of three begin like an earlier one."""
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for number in range(NUM_PROMPTS):
        own = [draw.randrange(100, 40_000) for _ in range(draw.randrange(20, 900))]
        shared = draw.choice(prompts)[: len(own) * 3 // 4] if number % 3 else []
        prompts.append(shared + own[len(shared) :])
    return prompts


def body_of(prompt: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "model": NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True, "logprobs": 1, **changes,
    }  # fmt: skip


def answer(server: Served, prompt: list[int]) -> tuple[Any, ...]:
    """Text and log-probabilities."""
    status, content = server.ask("/v1/completions", body_of(prompt), timeout=600)
    if status != 200:
        raise RuntimeError(f"status {status}: {content[:500]!r}")
    choice = json.loads(content)["choices"][0]
    return choice["text"], tuple(choice["logprobs"]["token_logprobs"])


class Clients:
    """Threads that ask until told to stop, and what came of it."""

    def __init__(self, server: Served, prompts: list[list[int]], alone: list[Any]) -> None:
        self._server, self._prompts, self._alone = server, prompts, alone
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.counts = {"answers": 0, "other": 0, "hung up": 0, "errors": 0}
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(NUM_CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            number = draw.randrange(len(self._prompts))
            try:
                if draw.random() < HANG_UP_SHARE:
                    self._hang_up(self._prompts[number], draw)
                    self._count("hung up")
                else:
                    same = answer(self._server, self._prompts[number]) == self._alone[number]
                    self._count("answers")
                    if not same:
                        self._count("other")
            except Exception as error:
                print(f"client {seed}: {error}", flush=True)
                self._count("errors")
                time.sleep(1)

    def _hang_up(self, prompt: list[int], draw: random.Random) -> None:
        body = body_of(prompt, stream=True)
        connection, response = self._server.open("/v1/completions", body, timeout=600)
        with contextlib.closing(connection):
            for _ in range(draw.randrange(1, 12)):
                response.readline()

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model; the demo model when left out")
    parser.add_argument("--kv-cache-dtype", default="fibquant")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--port", type=int)
    add_out(parser)
    args = parser.parse_args()

    prompts = prompts_of(seed=0)
    flags = ["--kv-cache-dtype", args.kv_cache_dtype, "--dtype", "float32", "--enforce-eager"]
    flags += ["--max-model-len", "1024", "--block-size", str(BLOCK_SIZE), "--max-num-seqs", "8"]
    flags += ["--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--num-gpu-blocks-override", str(CACHE_TOKENS // BLOCK_SIZE)]
    flags += ["--no-enable-log-requests", "--uvicorn-log-level", "warning"]
    # Answers are compared bit by bit, which mode quality does not promise.
    flags += ["--additional-config", json.dumps({"fibquant": {"mode": "exact"}})]
    # One thread that may run anywhere: the machine may have something else to do.
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            model_or_demo(args.model), *flags, log_path=Path(folder) / "log",
            environment=environment, port=args.port,
        ) as server,
    ):  # fmt: skip
        alone = [answer(server, prompt) for prompt in prompts]
        before = server.metrics()
        begin = time.monotonic()
        samples = []
        with Clients(server, prompts, alone) as clients:
            while (elapsed := time.monotonic() - begin) < args.minutes * 60:
                samples.append((round(elapsed, 1), server.rss()))
                time.sleep(SAMPLE_S)
        again = [answer(server, prompt) for prompt in prompts]
        samples.append((round(time.monotonic() - begin, 1), server.rss()))
        after = server.metrics()
        usage = after["vllm:kv_cache_usage_perc"]

    settled = [rss for seconds, rss in samples if seconds > args.minutes * 60 / 4]
    growth = settled[-1] - settled[0]
    row = {
        "bench": "soak", "format": args.kv_cache_dtype, "minutes": args.minutes,
        **clients.counts, "same_afterwards": again == alone, "usage_afterwards": usage,
        "preemptions": int(after["vllm:num_preemptions"] - before["vllm:num_preemptions"]),
        "growth_bytes": growth, "samples": samples,
    }  # fmt: skip
    append(args.out, **row)
    print({name: value for name, value in row.items() if name != "samples"})
    print(f"RSS at a quarter of the time {settled[0] / 2**20:.0f} MiB, "
          f"at the end {settled[-1] / 2**20:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
