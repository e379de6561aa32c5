# SPDX-License-Identifier: Apache-2.0
"""Proves the GPU kernels on a GPU machine: build, correctness, memory errors, speed.

    python -m benchmarks.gpu_proof build                     nvcc, for this device alone
    python -m benchmarks.gpu_proof test                      CUDA and Triton against the oracle
    python -m benchmarks.gpu_proof sanitize                  compute-sanitizer on a subset of them
    python -m benchmarks.gpu_proof rates --out gpu.jsonl     micro-rates, copy rate, and encode
    python -m benchmarks.gpu_proof speed --out gpu.jsonl     decode attention beside others
    python -m benchmarks.gpu_proof batches --out gpu.jsonl   prompts, chunks, mixed batches
    python -m benchmarks.gpu_proof engine --model MODEL --out gpu.jsonl     a server of each format
    python -m benchmarks.gpu_report gpu.jsonl                tables and plot for the documents

What is timed is replayed from a CUDA graph, as vLLM serves decode steps; what cannot be captured is
timed as it is, and its row says so. Each but engine fits in ten minutes: speed stops after
--minutes, with exit status 3, and goes on where it stopped when it is called again with the same
--out. Every (preset, shape, batch, context) is a line of the output. "roofline" is the bytes read
over the copy rate, measured in the same run, as a fraction of the time taken. --dry-run, on any
machine, runs tiny cases of speed, batches and encode in Triton's interpreter and in the emulator,
without figures, checks the calls of vLLM's kernels, and prints the commands of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import gpu_batches, gpu_engine, gpu_rates
from benchmarks.common import add_out, append
from benchmarks.gpu_peers import PEERS, Case, make_cache
from benchmarks.gpu_timing import copy_rate, into, milliseconds
from benchmarks.plot import rows_of

# d, KV heads, group; the first is that of the targets.
SHAPES = ((128, 8, 4), (128, 8, 8), (128, 8, 1), (64, 8, 4), (64, 8, 8), (64, 8, 1))
MAX_BYTES = 24 << 30  # of bfloat16 keys and values: larger cases are left out
SANITIZED = "k4v2 or bytes or window or padded or gain_rules or freed or chunk"
"""Tests that compute-sanitizer runs: it slows kernels some hundredfold."""


def our_kernels(case: Case, preset: str, dry_run: bool):
    """{name: call}, the bytes of the cache, and what the calls write to."""
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.ops import Attend, Batch, Pages, cuda, gpu

    codec = KVCodec.from_preset(preset, case.head_dim)
    cache, query = make_cache(case, codec), case.query()
    out, table, lens = torch.empty_like(query), case.table(), case.lens()
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    batch, served = Batch(starts, lens, table), [gpu.TRITON]
    if dry_run:
        from tests.emulated import emulated

        served.append(cuda.Cuda(emulated()))
    elif gpu.why_not_cuda(codec, cache) is None:
        served.append(cuda.kernels())
    calls = {}
    for kernels in served:
        pages, attend = Pages(cache, codec, None, kernels), Attend(case.head_dim**-0.5)
        calls[kernels.name] = functools.partial(
            kernels.paged_attention, query, out, pages, batch, attend
        )
    return calls, cache.numel(), out


def bench_case(args, preset: str, case: Case, rate: float) -> dict:
    calls, num_bytes, out = our_kernels(case, preset, args.dry_run)
    row = {
        "preset": preset, "shape": (case.head_dim, case.num_kv_heads, case.group_size),
        "batch": case.batch, "context": case.context, "bytes": num_bytes,
    }  # fmt: skip
    answers = {}
    for name, run in calls.items():
        run()
        answers[name] = out.float().cpu()
        row[f"finite_{name}"] = bool(answers[name].isfinite().all())
        if not args.dry_run:
            into(row, name, run, args.repetitions)
            row[f"roofline_{name}"] = num_bytes / rate / row[f"ms_{name}"]
    if len(answers) == 2:
        row["difference"] = float((answers["cuda"] - answers["triton"]).abs().max())
    return row


def bench_peers(args, case: Case) -> dict:
    """Times of the others, which do not depend on the preset."""
    row: dict = {}
    for name, prepare in PEERS.items():
        run = None  # the last one's memory
        try:
            run, num_bytes = prepare(case)
            if args.dry_run:
                try_dry(name, run)
                continue
            into(row, name, run, args.repetitions)
            row[f"bytes_{name}"] = num_bytes
        except Exception as error:  # one peer that cannot run must not end the others
            row[f"skipped_{name}"] = f"{type(error).__name__}: {error}"[:200]
    return row


def try_dry(name: str, run: Callable[[], object]) -> None:
    """Without a GPU vLLM has no Triton: of its kernels only the call is checked."""
    if isinstance(run, functools.partial):
        inspect.signature(run.func).bind(*run.args, **run.keywords)
    elif name == "sdpa":
        run()


def setting() -> dict:
    """Hardware, versions and command, for every line."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "vllm", "flashinfer-python", "flash-attn", "xformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": " ".join(sys.argv[1:]),
    }


def part_build(args) -> int:
    arch = "90" if args.dry_run else "{}{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "setup.py", "build_cuda"]
    return execute(args, command, dict(os.environ, FIBQUANT_CUDA_ARCHS=arch))


def part_test(args) -> int:
    of_cuda = (f"test_cuda_{name}" for name in ("emulated", "mapped", "copies", "chunks"))
    cases = *of_cuda, "triton_cases"
    files = [f"tests/ops/{name}.py" for name in cases]
    return execute(args, [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files])


def part_sanitize(args) -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None and not args.dry_run:
        sys.exit("gpu_proof: compute-sanitizer must be on the PATH; it comes with the CUDA toolkit")
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "tests/ops/test_cuda_emulated.py",
        "tests/ops/test_cuda_chunks.py",
    ]
    worst = 0
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9"]
        code = execute(args, [*command, *tests, "-k", SANITIZED])
        if not args.dry_run:
            report(args, {"sanitizer": check, "exit": code})
        worst = worst or code
    return worst


def execute(args, command: list[str], environment: dict | None = None) -> int:
    """Runs a command; a dry run prints it."""
    if args.dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command, env=environment).returncode


def report(args, row: dict) -> None:
    print(json.dumps(row), flush=True)
    append(args.out, **row, **setting())


def part_rates(args) -> int:
    """Micro-rates, copy rate, and encoding of 1 to 16,384 tokens beside the bfloat16 store."""
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:  # the source compiles; what the GPU would answer is not known
        print(shlex.join(gpu_rates.build_command("90", Path("build/libfibquant_gpu_rates.so"))))
    else:
        report(args, {"rate": "copy", "gb_per_s": copy_rate(args.repetitions) / 1e6})
        for row in gpu_rates.micro_rates(milliseconds, args.repetitions):
            report(args, row)
    for row, run in gpu_rates.encodes(device, args.presets):
        is_theirs = row["preset"] == gpu_rates.STORE  # vLLM has no Triton without a GPU
        try:
            if not args.dry_run:
                row["us"] = milliseconds(run, args.repetitions) * 1000
            elif not is_theirs:
                run()
        except Exception as error:
            if not is_theirs:
                raise
            row["skipped_store"] = f"{type(error).__name__}: {error}"[:200]
        report(args, row)
    return 0


def done_cases(path: Path | None) -> set[tuple]:
    """Cases of earlier `speed` commands with the same --out."""
    rows = rows_of(path) if path else []
    return {
        (tuple(r["shape"]), r["batch"], r["context"], r["preset"]) for r in rows if "shape" in r
    }


def part_speed(args) -> int:
    """Cases nobody has measured yet, until the minutes are over; exit status 3 if some are left."""
    shapes, batches, contexts = SHAPES, args.batches, args.contexts
    if args.dry_run:
        shapes, batches, contexts = ((64, 1, 2),), [2], [100]
    end = time.monotonic() + 60 * args.minutes
    rate = 0.0 if args.dry_run else copy_rate(args.repetitions)
    device, done = "cpu" if args.dry_run else "cuda", done_cases(args.out)
    for shape, batch, context in itertools.product(shapes, batches, contexts):
        case = Case(*shape, batch, context, device)
        presets = [p for p in args.presets if (shape, batch, context, p) not in done]
        if 4 * shape[0] * shape[1] * batch * context > MAX_BYTES or not presets:
            continue
        peers = None
        for preset in presets:
            if time.monotonic() > end:
                print("gpu_proof: cases are left; the same command goes on with them")
                return 3
            peers = bench_peers(args, case) if peers is None else peers
            report(args, {**bench_case(args, preset, case, rate), **peers})
    return 0


def part_batches(args) -> int:
    """Prompts, chunks and mixed batches, beside vLLM's attention over uncompressed pages."""
    device = "cpu" if args.dry_run else "cuda"
    cases = gpu_batches.TINY if args.dry_run else gpu_batches.PREFILLS
    kernels = None
    if args.dry_run:
        from tests.emulated import emulated
        from vllm_fibquant.ops import cuda

        kernels = cuda.Cuda(emulated())
    for shape, (name, lengths) in itertools.product(SHAPES[3:4] if args.dry_run else SHAPES[:2],
                                                    cases.items()):  # fmt: skip
        case, row = gpu_batches.Lengths(*shape, *lengths, device), {"batches": name, "of": shape}
        for other, prepare in gpu_batches.OTHERS.items():
            try:
                run, row[f"bytes_{other}"] = prepare(case)
                try_dry(other, run) if args.dry_run else into(row, other, run, args.repetitions)
            except Exception as error:
                row[f"skipped_{other}"] = f"{type(error).__name__}: {error}"[:200]
            run = None
        for preset in args.presets:
            run, out = gpu_batches.ours(case, preset, kernels)
            run()
            row[f"finite_{preset}"] = bool(out.isfinite().all())
            if not args.dry_run:
                into(row, preset, run, args.repetitions)
        report(args, row)
    return 0


def part_engine(args) -> int:
    """Servers, one format after the other: time to the first token and between tokens."""
    if args.dry_run:
        for name in gpu_engine.FORMATS:
            print(shlex.join(["vllm-fibquant", "serve", args.model,
                              *gpu_engine.server_flags(name, args.tokens)]))  # fmt: skip
        return 0
    rows = gpu_engine.measure(
        args.model, list(gpu_engine.FORMATS), args.tokens, args.output, args.concurrency
    )
    for row in rows:
        report(args, row)
    return 0


PARTS = {
    "build": part_build, "test": part_test, "sanitize": part_sanitize, "rates": part_rates,
    "speed": part_speed, "batches": part_batches, "engine": part_engine,
}  # fmt: skip


def main() -> None:
    from vllm_fibquant.codec.config import PRESETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, or the command; no GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="of speed; default: 9")
    parser.add_argument("--presets", nargs="+", default=[p for p in PRESETS if p != "fibquant"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1, 8, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 4096, 131072])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--model", default="MODEL", help="of engine: a model's folder or name")
    parser.add_argument("--tokens", type=int, default=8192, help="of engine: of a request, in all")
    parser.add_argument("--output", type=int, default=256, help="of engine: new ones among them")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    add_out(parser)
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        sys.exit("gpu_proof: device must be a CUDA GPU, got none; give --dry-run")
    sys.exit(PARTS[args.part](args))


if __name__ == "__main__":
    main()
