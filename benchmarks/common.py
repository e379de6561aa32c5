# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their clock, result lines, and runs in processes of their own."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="append results to this jsonl file")


def add_one_thread(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--one-thread", action="store_true",
                        help="one thread, timed by its CPU time: for shared machines")  # fmt: skip


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock in seconds; with --one-thread it also limits torch to one thread."""
    if not args.one_thread:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.thread_time


def cpu_name() -> str:
    """The processor as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def append(path: Path | None, **row: Any) -> None:
    """Appends a result line, if a file was asked for."""
    if path:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def model_or_demo(model: str | None) -> str:
    """The folder of a model; the demo model's, fetched if need be, when there is none."""
    if model is not None:
        return model
    from vllm_fibquant.demo_model import ensure_demo_model

    return str(ensure_demo_model())


def run_apart(module: str, arguments: list[str], label: str) -> Any:
    """Runs `python -m benchmarks.<module>` and returns what it printed after "RESULT ", from JSON.

    Exits with the end of its output when there is none.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{module}: {label} failed:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))
