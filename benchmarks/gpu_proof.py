# SPDX-License-Identifier: Apache-2.0
"""Proves the GPU kernels on a GPU machine with torch and Triton: correctness, then decode speed.

    python -m benchmarks.gpu_proof test                      the kernels against the oracle
    python -m benchmarks.gpu_proof speed --out gpu.jsonl     decode attention beside torch's SDPA
    python -m benchmarks.gpu_proof speed --dry-run           a tiny case on any machine, no figures

Every (preset, shape, batch, context) is a line of the output; --presets, --batches and --contexts
choose parts that fit a time limit. SDPA reads contiguous bfloat16 keys and values: no pages, the
easiest case for it. GB/s counts the bytes of the cache alone; compare it with the card's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.common import add_out, append

SHAPES = ((64, 8, 1), (64, 8, 4), (128, 8, 1), (128, 8, 4), (128, 8, 8))  # d, kv heads, group
BLOCK_SIZE = 16
MAX_BYTES = 24 << 30  # of bfloat16 keys and values: larger cases are left out


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


def bench_case(args, preset: str, shape: tuple[int, int, int], batch: int, context: int) -> dict:
    from vllm_fibquant import gpu
    from vllm_fibquant.codec import KVCodec

    head_dim, num_kv_heads, group_size = shape
    device = "cpu" if args.dry_run else "cuda"
    codec = KVCodec.from_preset(preset, head_dim)
    layout, blocks = codec.layout, -(-context // BLOCK_SIZE)
    cache = torch.randint(
        0, 256, (batch * blocks, num_kv_heads, BLOCK_SIZE, layout.record_bytes),
        dtype=torch.uint8, device=device,
    )  # fmt: skip
    norms = torch.rand(*cache.shape[:3], 2, device=device).half() * 8 + 4
    cache[..., layout.key_norm_offset :] = norms.view(torch.uint8)
    table = torch.randperm(batch * blocks).to(torch.int32).view(batch, blocks).to(device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    query = torch.randn(batch, num_kv_heads * group_size, head_dim, device=device).bfloat16()
    out = torch.empty_like(query)

    def codes() -> None:
        gpu.paged_attention(
            query, cache, codec, starts, lens, table, out, scale=head_dim**-0.5
        )  # fmt: skip

    row = {
        "preset": preset, "shape": shape, "batch": batch, "context": context,
        "bytes": cache.numel(),
        "bytes_bf16": 4 * head_dim * num_kv_heads * context * batch,
    }  # fmt: skip
    codes()
    if args.dry_run:
        return {**row, "finite": bool(out.isfinite().all())}
    key, value = (
        torch.randn(batch, num_kv_heads, context, head_dim, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = query.unsqueeze(2)  # [batch, heads, 1, head_dim]
    row["ms"] = milliseconds(codes, args.repetitions)
    row["ms_sdpa"] = milliseconds(
        lambda: attend(grouped, key, value, enable_gqa=group_size > 1), args.repetitions
    )
    row["gb_per_s"] = row["bytes"] / row["ms"] / 1e6
    row["device"] = torch.cuda.get_device_name()
    return row


def main() -> None:
    from vllm_fibquant.config import PRESETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof")
    parser.add_argument("part", choices=["test", "speed"])
    parser.add_argument("--dry-run", action="store_true")
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
    if args.part == "test":
        command = [sys.executable, "-m", "pytest", "-q", "tests/triton_cases.py"]
        sys.exit(subprocess.run(command).returncode)
    shapes, batches, contexts = SHAPES, args.batches, args.contexts
    if args.dry_run:
        shapes, batches, contexts = ((64, 1, 2),), [2], [100]
    for preset in args.presets:
        for shape in shapes:
            for batch in batches:
                for context in contexts:
                    if 4 * shape[0] * shape[1] * batch * context > MAX_BYTES:
                        continue
                    row = bench_case(args, preset, shape, batch, context)
                    print(json.dumps(row), flush=True)
                    append(args.out, **row)


if __name__ == "__main__":
    main()
