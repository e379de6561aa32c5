# SPDX-License-Identifier: Apache-2.0
"""One decode step of latent attention, over records and by vLLM's own kernel over bfloat16.

Attention of one layer and one request with 16 heads (DeepSeek V2 Lite) or 128 (V3), latents of 512
and rotary keys of 64, blocks of 16 tokens; medians.

    python -m benchmarks.bench_latent --one-thread
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import vllm._custom_ops as vllm_ops

from benchmarks.common import add_one_thread, add_out, append, clock_of, cpu_name
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.ops.latent import attend_latents, write_latents

LATENT_DIM, ROTARY_DIM, BLOCK_SIZE = 512, 64, 16
NUM_HEADS = (16, 128)
CONTEXTS = (256, 1024, 4096)
REPEATS = 9


def median_us(call: Callable[[], object], clock: Callable[[], float]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times) * 1e6


def step_times(num_heads: int, context: int, clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds of one layer's attention, by cache."""
    generator = torch.Generator().manual_seed(0)
    width, num_blocks = LATENT_DIM + ROTARY_DIM, context // BLOCK_SIZE

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    query, tokens = draw(1, num_heads, width), draw(context, width)
    table = torch.randperm(num_blocks, generator=generator)[None].int()
    lengths = torch.tensor([context], dtype=torch.int32)
    slots = torch.arange(context)
    dense, out = tokens.view(num_blocks, BLOCK_SIZE, width), draw(1, num_heads, LATENT_DIM)
    scale = width**-0.5
    times = {
        "auto": median_us(
            lambda: vllm_ops.mla_decode_kvcache_cpu(out, query, dense, scale, table, lengths), clock
        )
    }
    for name in ("fibquant_3bit", "fibquant_2bit"):
        codec = LatentCodec.from_preset(PRESETS[name], LATENT_DIM, ROTARY_DIM)
        pages = torch.zeros(num_blocks, BLOCK_SIZE, codec.record_bytes, dtype=torch.uint8)
        latents, rotary = tokens.split([LATENT_DIM, ROTARY_DIM], dim=-1)
        write_latents(codec, latents, rotary, pages, slots)
        read = lambda c=codec, p=pages: attend_latents(c, query, p, table, lengths, scale)  # noqa: E731
        times[name] = median_us(read, clock)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_one_thread(parser)
    add_out(parser)
    args = parser.parse_args()
    clock = clock_of(args)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads: us of one layer's decode attention")
    for num_heads, context in itertools.product(NUM_HEADS, CONTEXTS):
        times = step_times(num_heads, context, clock)
        told = (f"{name} {us:.0f} ({times['auto'] / us:.2f}x)" for name, us in times.items())
        print(f"{num_heads} heads, {context} tokens:", *told)
        facts = {"num_heads": num_heads, "context": context, "cpu": cpu_name()}
        append(args.out, bench="latent", **facts, **times)


if __name__ == "__main__":
    main()
