# SPDX-License-Identifier: Apache-2.0
"""Proves the GPU kernels on a GPU machine: build, correctness, memory errors, speed.

    python -m benchmarks.gpu_proof build                     nvcc, for this device alone
    python -m benchmarks.gpu_proof test                      CUDA and Triton against the oracle
    python -m benchmarks.gpu_proof sanitize                  compute-sanitizer on a subset of them
    python -m benchmarks.gpu_proof rates --out gpu.jsonl     copy rate, and encode
    python -m benchmarks.gpu_proof speed --out gpu.jsonl     decode attention beside others
    python -m benchmarks.gpu_proof speed --dry-run           a tiny case on any machine, no figures

Each is made to fit in ten minutes; speed's --presets, --batches and --contexts choose parts. Every
(preset, shape, batch, context) is a line of the output. "roofline" is the bytes read over the copy
rate, measured in the same run, as a fraction of the time taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.common import add_out, append
from benchmarks.gpu_peers import BLOCK_SIZE, PEERS, Case

SHAPES = ((64, 8, 1), (64, 8, 4), (128, 8, 1), (128, 8, 4), (128, 8, 8))  # d, kv heads, group
MAX_BYTES = 24 << 30  # of bfloat16 keys and values: larger cases are left out
SANITIZED = "k4v2 or bytes or window or padded or gain_rules"
"""Tests that compute-sanitizer runs: it slows kernels some hundredfold."""


def milliseconds(run: Callable[[], object], repetitions: int) -> float:
    """Median time of a call on the device; the cache between calls is flushed by 256 MiB."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for repetition in range(repetitions + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if repetition >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_rate(repetitions: int) -> float:
    """Bytes read and written per millisecond by a large copy."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), repetitions)


def make_cache(case: Case, codec) -> torch.Tensor:
    layout = codec.layout
    cache = torch.randint(
        0, 256,
        (case.table().numel(), case.num_kv_heads, BLOCK_SIZE, layout.record_bytes),
        dtype=torch.uint8, device=case.device,
    )  # fmt: skip
    norms = torch.rand(*cache.shape[:3], 2, device=case.device).half() * 8 + 4
    cache[..., layout.key_norm_offset :] = norms.view(torch.uint8)
    return cache


def our_kernels(case: Case, preset: str, dry_run: bool):
    """{name: call}, the bytes of the cache, and what the calls write to."""
    from vllm_fibquant import gpu, native_cuda
    from vllm_fibquant.codec import KVCodec
    from vllm_fibquant.kernels import attention

    codec = KVCodec.from_preset(preset, case.head_dim)
    cache, query = make_cache(case, codec), case.query()
    out, table, lens = torch.empty_like(query), case.table(), case.lens()
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    arguments = (query, cache, codec, starts, lens, table, out)
    scale = case.head_dim**-0.5
    calls = {"triton": lambda: attention.paged_attention(*arguments, scale=scale)}
    if dry_run:
        from tests.emulated import emulated

        calls["cuda"] = lambda: emulated().paged_attention(*arguments, scale=scale)
    elif gpu.why_not_cuda(cache, codec) is None:
        calls["cuda"] = lambda: native_cuda.library().paged_attention(*arguments, scale=scale)
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
            row[f"ms_{name}"] = milliseconds(run, args.repetitions)
            row[f"roofline_{name}"] = num_bytes / rate / row[f"ms_{name}"]
    if len(answers) == 2:
        row["difference"] = float((answers["cuda"] - answers["triton"]).abs().max())
    return row


def bench_peers(args, case: Case) -> dict:
    """Times of the others, which do not depend on the preset."""
    row: dict = {}
    for name, prepare in PEERS.items():
        try:
            run, num_bytes = prepare(case)
            if args.dry_run:
                continue
            row[f"ms_{name}"], row[f"bytes_{name}"] = milliseconds(run, args.repetitions), num_bytes
        except Exception as error:  # one peer that cannot run must not end the others
            row[f"skipped_{name}"] = f"{type(error).__name__}: {error}"[:200]
    return row


def part_build(args) -> int:
    major, minor = torch.cuda.get_device_capability()
    environment = dict(os.environ, FIBQUANT_CUDA_ARCHS=f"{major}{minor}")
    return subprocess.run([sys.executable, "setup.py", "build_cuda"], env=environment).returncode


def part_test(args) -> int:
    files = ["tests/test_cuda_emulated.py", "tests/triton_cases.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
    return subprocess.run(command).returncode


def part_sanitize(args) -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        sys.exit("gpu_proof: compute-sanitizer must be on the PATH; it comes with the CUDA toolkit")
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/test_cuda_emulated.py"]
    worst = 0
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *tests, "-k", SANITIZED]
        code = subprocess.run(command).returncode
        print(json.dumps({"sanitizer": check, "exit": code}), flush=True)
        append(args.out, sanitizer=check, exit=code)
        worst = worst or code
    return worst


def part_rates(args) -> int:
    """Copy rate, and encoding of many tokens per preset."""
    from vllm_fibquant import gpu
    from vllm_fibquant.codec import KVCodec

    device = torch.cuda.get_device_name()
    append(args.out, rate="copy", gb_per_s=copy_rate(args.repetitions) / 1e6, device=device)
    for preset in args.presets:
        codec = KVCodec.from_preset(preset, 128)
        case = Case(128, 8, 1, 1, 16384, "cuda")
        cache = make_cache(case, codec)
        key = torch.randn(16384, 8, 128, device="cuda").bfloat16()
        for tokens in (1, 128, 16384):
            slots = torch.arange(tokens, device="cuda")

            def run(slots=slots, cache=cache, codec=codec, key=key) -> None:
                gpu.encode_kv(key, key, cache, slots, codec)

            row = {"rate": "encode", "preset": preset, "tokens": tokens, "device": device}
            row["kernel"] = gpu.kernel_name(cache, codec)
            row["us"] = milliseconds(run, args.repetitions) * 1000
            print(json.dumps(row), flush=True)
            append(args.out, **row)
    return 0


def part_speed(args) -> int:
    shapes, batches, contexts = SHAPES, args.batches, args.contexts
    if args.dry_run:
        shapes, batches, contexts = ((64, 1, 2),), [2], [100]
    rate = 0.0 if args.dry_run else copy_rate(args.repetitions)
    device = "cpu" if args.dry_run else "cuda"
    named = {} if args.dry_run else {"device": torch.cuda.get_device_name()}
    for shape in shapes:
        for batch in batches:
            for context in contexts:
                case = Case(*shape, batch, context, device)
                if 4 * shape[0] * shape[1] * batch * context > MAX_BYTES:
                    continue
                peers = bench_peers(args, case)
                for preset in args.presets:
                    row = {**bench_case(args, preset, case, rate), **peers, **named}
                    print(json.dumps(row), flush=True)
                    append(args.out, **row)
    return 0


PARTS = {
    "build": part_build, "test": part_test, "sanitize": part_sanitize, "rates": part_rates,
    "speed": part_speed,
}  # fmt: skip


def main() -> None:
    from vllm_fibquant.config import PRESETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="speed alone: a tiny case, no GPU")
    parser.add_argument("--presets", nargs="+", default=[p for p in PRESETS if p != "fibquant"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--repetitions", type=int, default=20)
    add_out(parser)
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        sys.exit("gpu_proof: device must be a CUDA GPU, got none; give --dry-run")
    sys.exit(PARTS[args.part](args))


if __name__ == "__main__":
    main()
