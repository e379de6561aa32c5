# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and between tokens of a server on a GPU, by format of the cache.

One server after the other, each asked by vLLM's own client (`vllm bench serve`, random prompts)
with several numbers of requests at once. All get the same share of the GPU's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_load import CLIENT
from benchmarks.served import NAME, serving

OURS = '{"fibquant": {"unproven_gpu": true}}'
FORMATS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "fp8": (),
    "turboquant_4bit_nc": (),
    "fibquant": ("--additional-config", OURS),
    "fibquant_4bit": ("--additional-config", OURS),
    "fibquant_2bit": ("--additional-config", OURS),
}
MEASURED = [f"{p}_{m}_ms" for m in ("ttft", "tpot", "itl") for p in ("p50", "p95")]
REQUESTS = 4  # of each of those at once


def server_flags(name: str, context: int) -> list[str]:
    return [
        "--kv-cache-dtype", name, *FORMATS[name], "--max-model-len", str(context + 512),
        "--gpu-memory-utilization", "0.9", "--no-enable-prefix-caching",
    ]  # fmt: skip


def client_command(
    model: str, url: str, folder: str, context: int, output: int, concurrency: int
) -> list[str]:
    return [
        sys.executable, "-c", CLIENT, "--backend", "openai", "--base-url", url, "--model", NAME,
        "--tokenizer", model, "--dataset-name", "random", "--random-input-len",
        str(context - output), "--random-output-len", str(output), "--num-prompts",
        str(REQUESTS * concurrency), "--num-warmups", "2", "--max-concurrency", str(concurrency),
        "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl",
        "--metric-percentiles", "50,95", "--save-result", "--result-dir", folder,
        "--result-filename", "result.json", "--disable-tqdm",
    ]  # fmt: skip


def measure(
    model: str, formats: list[str], context: int, output: int, concurrencies: list[int]
) -> Iterator[dict[str, Any]]:
    """A row for each format and number of requests at once; a format that cannot run says why."""
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"engine": name, "context": context, "output": output}
            try:
                with serving(
                    model, *server_flags(name, context), log_path=Path(folder) / "log"
                ) as server:
                    row["cache_tokens"] = server.cache_tokens()
                    for concurrency in concurrencies:
                        yield {
                            **row, "concurrency": concurrency,
                            **_ask(model, server.url, folder, context, output, concurrency),
                        }  # fmt: skip
            except RuntimeError as error:
                yield {**row, f"skipped_{name}": str(error)[-300:]}


def _ask(model: str, url: str, folder: str, *sizes: int) -> dict[str, Any]:
    result = Path(folder) / "result.json"
    result.unlink(missing_ok=True)
    run = subprocess.run(client_command(model, url, folder, *sizes), capture_output=True, text=True)
    if not result.exists():
        raise RuntimeError(f"the client failed: {run.stderr[-300:]}")
    report = json.loads(result.read_text())
    if report["completed"] != REQUESTS * sizes[2]:
        raise RuntimeError(f"only {report['completed']} requests of {REQUESTS * sizes[2]} ended")
    return {
        "output_tokens_per_s": report["output_throughput"],
        **{name: report[name] for name in MEASURED},
    }
