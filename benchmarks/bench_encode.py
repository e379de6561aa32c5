# SPDX-License-Identifier: Apache-2.0
"""Encode-and-store beside vLLM's own store of uncompressed keys and values of the model's dtype.

Reported: microseconds per token of one layer, for a single decode token and for a prefill chunk,
with keys as they are and through a calibration's map ("as served"). The tables of one layer stay in
the caches of the CPU: a model's other layers are not there to displace them.

    python -m benchmarks.bench_encode --out results.jsonl
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch

from benchmarks.bench_attention import AS_SERVED, BLOCK_SIZE, PRESET_NAMES, Case, options_of
from benchmarks.common import add_one_thread, add_out, append, clock_of, cpu_name
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops import cpu_library

SHAPES = ((64, 3), (128, 8))  # head_dim, num_kv_heads
TOKENS_PER_SAMPLE = 512  # calls of few tokens are repeated: reading the clock takes as long as one


def stores(
    head_dim: int, num_kv_heads: int, num_tokens: int, dtype: torch.dtype, served: list[str]
) -> dict[str, Callable[[], object]]:
    """One call per format that stores `num_tokens` tokens of one layer."""
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim).to(dtype)
    num_blocks = num_tokens // BLOCK_SIZE + 2
    slots = torch.randperm(num_blocks * BLOCK_SIZE)[:num_tokens]
    plain = torch.empty(num_blocks, num_kv_heads, BLOCK_SIZE * 2, head_dim, dtype=dtype)
    key_cache, value_cache = plain.chunk(2, dim=2)
    isa = _get_attn_isa(dtype, BLOCK_SIZE, head_dim, "auto")
    calls: dict[str, Callable[[], object]] = {
        "vllm": lambda: vllm_ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa
        )
    }
    case = Case((head_dim, num_kv_heads, 1), 4096, 1, dtype)
    positions = torch.arange(num_tokens) + 1000
    for label in (*PRESET_NAMES, *(f"{name} {AS_SERVED}" for name in served)):
        name = label.removesuffix(f" {AS_SERVED}")
        codec = KVCodec.from_preset(PRESETS[name], head_dim)
        shape = (num_blocks, num_kv_heads, BLOCK_SIZE, codec.layout.record_bytes)
        cache = torch.zeros(shape, dtype=torch.uint8)
        key_map = None if label == name else options_of(case, name)[AS_SERVED]["key_map"]
        pages = ops.pages_of(cache, codec, key_map)
        at = None if key_map is None else positions
        calls[label] = functools.partial(ops.encode_kv, key, value, slots, pages, at)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--served", nargs="*", default=["fibquant_3bit"],
                        help="presets also run through a calibration's map of keys")  # fmt: skip
    parser.add_argument("--instruction-set", help="avx2, say; default: this CPU's best")
    parser.add_argument("--repetitions", type=int, default=15)
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()
    cpu_library.select_isa(args.instruction_set)
    clock = clock_of(args)

    print(f"kernel {ops.kernel_name()} on {cpu_name()}, {torch.get_num_threads()} threads, "
          f"model {args.dtype}")  # fmt: skip
    print("| d, kv heads | tokens | format | us / token and layer | times vLLM's |")
    print("|---|---|---|---|---|")
    for head_dim, num_kv_heads in SHAPES:
        for num_tokens in args.tokens:
            dtype = getattr(torch, args.dtype)
            calls = stores(head_dim, num_kv_heads, num_tokens, dtype, args.served)
            num_calls = max(1, TOKENS_PER_SAMPLE // num_tokens)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for repetition in range(args.repetitions + 2):
                for name, call in calls.items():
                    begin = clock()
                    for _ in range(num_calls):
                        call()
                    if repetition >= 2:
                        times[name].append((clock() - begin) / num_calls / num_tokens)
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            for name, median in medians.items():
                ratio = median / medians["vllm"]
                print(f"| {head_dim}, {num_kv_heads} | {num_tokens} | {name} | "
                      f"{median * 1e6:.2f} | {ratio:.2f}x |")  # fmt: skip
                append(
                    args.out,
                    bench="encode", head_dim=head_dim, num_kv_heads=num_kv_heads,
                    tokens=num_tokens, format=name, model_dtype=args.dtype,
                    seconds_per_token=times[name], median=median, vs_vllm=ratio,
                    kernel=ops.kernel_name(), threads=torch.get_num_threads(),
                    clock="cpu" if args.one_thread else "wall", cpu=cpu_name(),
                )  # fmt: skip


if __name__ == "__main__":
    main()
