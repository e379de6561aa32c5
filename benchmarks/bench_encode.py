# SPDX-License-Identifier: Apache-2.0
"""Encode-and-store beside vLLM's own store of uncompressed keys and values.

Reported: microseconds per token of one layer, for a prefill chunk and for a single decode token.

    python -m benchmarks.bench_encode --out results.jsonl
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch

from benchmarks.common import add_one_thread, add_out, append, clock_of
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS

BLOCK_SIZE = 128
SHAPES = ((64, 3), (128, 8))  # head_dim, num_kv_heads
PRESET_NAMES = (
    "fibquant_k5v3", "fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit",
)  # fmt: skip


def stores(head_dim: int, num_kv_heads: int, num_tokens: int) -> dict[str, Callable[[], object]]:
    """One call per format that stores `num_tokens` tokens of one layer."""
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim)
    num_blocks = num_tokens // BLOCK_SIZE + 2
    slots = torch.randperm(num_blocks * BLOCK_SIZE)[:num_tokens]
    plain = torch.empty(num_blocks, num_kv_heads, BLOCK_SIZE * 2, head_dim)
    key_cache, value_cache = plain.chunk(2, dim=2)
    isa = _get_attn_isa(torch.float32, BLOCK_SIZE, head_dim, "auto")
    calls: dict[str, Callable[[], object]] = {
        "vllm_float32": lambda: vllm_ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa
        )
    }
    for name in PRESET_NAMES:
        codec = KVCodec.from_preset(PRESETS[name], head_dim)
        shape = (num_blocks, num_kv_heads, BLOCK_SIZE, codec.layout.record_bytes)
        cache = torch.zeros(shape, dtype=torch.uint8)
        calls[name] = functools.partial(
            ops.encode_kv, key, value, slots, ops.pages_of(cache, codec)
        )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--repetitions", type=int, default=15)
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()
    clock = clock_of(args)

    print(f"kernel {ops.kernel_name()}, {torch.get_num_threads()} threads")
    print("| d, kv heads | tokens | format | us / token and layer |")
    print("|---|---|---|---|")
    for head_dim, num_kv_heads in SHAPES:
        for num_tokens in args.tokens:
            calls = stores(head_dim, num_kv_heads, num_tokens)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for repetition in range(args.repetitions + 2):
                for name, call in calls.items():
                    begin = clock()
                    call()
                    if repetition >= 2:
                        times[name].append((clock() - begin) / num_tokens)
            for name, seconds in times.items():
                median = statistics.median(seconds)
                print(
                    f"| {head_dim}, {num_kv_heads} | {num_tokens} | {name} | {median * 1e6:.2f} |"
                )
                append(
                    args.out,
                    bench="encode", head_dim=head_dim, num_kv_heads=num_kv_heads,
                    tokens=num_tokens, format=name, seconds_per_token=seconds, median=median,
                    kernel=ops.kernel_name(), threads=torch.get_num_threads(),
                )  # fmt: skip


if __name__ == "__main__":
    main()
