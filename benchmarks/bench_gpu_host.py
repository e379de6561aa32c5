# SPDX-License-Identifier: Apache-2.0
"""What the two ops of a GPU cost the host: checks, choices and structs, with launches left out.

    python -m benchmarks.bench_gpu_host

CPU tensors stand for a GPU's, and the library's two entry points do nothing; a GPU adds the current
stream and the launches. A step of a model that is not in a CUDA graph pays this in every layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from tests.emulated import aligned, emulated
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops import gpu, native_cuda

NUM_KV_HEADS, GROUP_SIZE, NUM_REQS, BLOCK_SIZE, MAX_BLOCKS = 8, 4, 32, 16, 512
REPEATS, CALLS = 15, 200


def measure(head_dim: int = 128) -> dict[str, float]:
    """Microseconds of each op: medians of REPEATS runs of CALLS calls."""
    library = emulated()
    codec = KVCodec.from_preset(PRESETS["fibquant_k5v3"], head_dim)
    shape = (64, NUM_KV_HEADS, BLOCK_SIZE, codec.layout.record_bytes)
    cache = aligned(torch.zeros(shape, dtype=torch.uint8))
    heads = (2 + GROUP_SIZE) * NUM_KV_HEADS
    qkv = torch.zeros(NUM_REQS, heads * head_dim, dtype=torch.bfloat16)
    query, key, value = (
        x.view(NUM_REQS, -1, head_dim)
        for x in qkv.split([n * NUM_KV_HEADS * head_dim for n in (GROUP_SIZE, 1, 1)], dim=1)
    )
    out = torch.empty(NUM_REQS, GROUP_SIZE * NUM_KV_HEADS, head_dim, dtype=torch.bfloat16)
    slots = torch.arange(NUM_REQS)
    starts = torch.arange(NUM_REQS + 1, dtype=torch.int32)
    lens = torch.full((NUM_REQS,), 100, dtype=torch.int32)
    table = torch.zeros(NUM_REQS, MAX_BLOCKS, dtype=torch.int32)
    ops: dict[str, Callable[[], object]] = {
        "encode_kv": lambda: gpu.encode_kv(key, value, cache, slots, codec),
        "paged_attention": lambda: gpu.paged_attention(
            query, cache, codec, starts, lens, table, out, scale=0.1
        ),
    }
    with (
        mock.patch.object(native_cuda, "is_built", lambda: True),
        mock.patch.object(native_cuda, "library", lambda: library),
        mock.patch.object(gpu, "_why_not_on", lambda device: None),
        mock.patch.object(gpu, "_chosen", {}),
        mock.patch.object(library.lib, "fq_cuda_encode_kv", lambda *args: 0),
        mock.patch.object(library.lib, "fq_cuda_paged_attention", lambda *args: 0),
    ):
        return {name: _median_us(call) for name, call in ops.items()}


def _median_us(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    for head_dim in (64, 128, 256):
        found = measure(head_dim)
        print(f"head_dim {head_dim}: " + ", ".join(f"{k} {v:.1f} us" for k, v in found.items()))


if __name__ == "__main__":
    main()
