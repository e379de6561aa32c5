# SPDX-License-Identifier: Apache-2.0
"""What the two ops cost the host, in every layer of every step, all but the kernels themselves, and
what a step's `Batch` does.

    python -m benchmarks.bench_host

The entry points of the libraries do nothing here. "cpu" is a decode step as served: transformed
keys, copies, raw new tokens. "gpu" is the CUDA library's door, CPU tensors standing for a GPU's (a
GPU adds the current stream and the launches); a step in a CUDA graph does not pay it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks.bench_attention import AS_SERVED, Case, options_of
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops import Attend, Batch, Kernels, Pages, cpu, cuda

PRESET, SHAPE, CONTEXT = "fibquant", (128, 8, 4), 512
REPEATS, CALLS = 15, 500


def median_us(call: Callable[[], object]) -> float:
    """Microseconds of a call: the median of REPEATS runs of CALLS calls."""
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    return statistics.median(times)


def calls(num_reqs: int, kernels: Kernels | None) -> dict[str, Callable[[], object]]:
    """One call of each op; `kernels` None for the CPU's, as served."""
    case = Case(SHAPE, CONTEXT, num_reqs, torch.bfloat16)
    codec = KVCodec.from_preset(PRESETS[PRESET], case.head_dim)
    shape = (case.num_blocks, case.num_kv_heads, 128, codec.layout.record_bytes)
    cache = torch.zeros(shape, dtype=torch.uint8)
    key, value = torch.randn(2, num_reqs, case.num_kv_heads, case.head_dim).bfloat16()
    slots, positions = torch.arange(num_reqs), torch.full((num_reqs,), CONTEXT - 1)
    given = {} if kernels else options_of(case, PRESET)[AS_SERVED]
    key_map, fresh = given.get("key_map"), given.get("fresh")
    copies, table = given.get("copied", (None, None))
    pages = Pages(cache, codec, key_map, kernels or ops.choose(codec, cache))
    requests = case.query_start_loc, case.seq_lens, case.block_table, table
    batch = Batch(*requests)
    attend = Attend(case.scale, copies=copies)
    copied = () if table is None else (torch.arange(num_reqs),) * 2  # new tokens and their rows
    return {
        "Batch, once a step": lambda: Batch(*requests, *copied),
        "encode_kv": lambda: ops.encode_kv(key, value, slots, pages, positions),
        "paged_attention": lambda: ops.paged_attention(
            case.query, case.out, pages, batch, attend, fresh
        ),
    }


def measure() -> dict[str, float]:
    """Microseconds by device, number of requests and op."""
    from tests.emulated import emulated

    entry_points = ("fq_encode_kv", "fq_plan", "fq_paged_attention")
    nothing = SimpleNamespace(**{name: lambda *args: 0 for name in entry_points})
    emulator, found = emulated(), {}
    with (
        mock.patch.object(cpu, "library", lambda: nothing),
        mock.patch.object(emulator.lib, "fq_cuda_encode_kv", lambda *args: 0),
        mock.patch.object(emulator.lib, "fq_cuda_paged_attention", lambda *args: 0),
    ):
        for device, kernels in (("cpu", None), ("gpu", cuda.Cuda(emulator))):
            for num_reqs in (1, 32):
                for op, call in calls(num_reqs, kernels).items():
                    found[f"{device}, {num_reqs} requests, {op}"] = median_us(call)
    return found


def main() -> None:
    torch.set_num_threads(1)
    for name, us in measure().items():
        print(f"{name}: {us:.1f} us")


if __name__ == "__main__":
    main()
