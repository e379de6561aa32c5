# SPDX-License-Identifier: Apache-2.0
"""The rates that the CUDA kernels are built on, and encoding, for benchmarks/gpu_proof.py.

`gather` reads codewords of 4, 8 and 16 bytes from a bank-replicated table, which should take 1, 2
and 4 wavefronts; `conflicts` reads 8 bytes from a table without copies. All but `read`, `copy` and
`encode` are warp instructions per clock and multiprocessor.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_peers import BLOCK_SIZE, Case, make_cache

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "gpu_rates.cu"
OPS = ("gather_4", "gather_8", "gather_16", "conflicts", "prmt", "hmma_16816", "imma_16832")
PREDICTED = {"gather_4": 1.0, "gather_8": 0.5, "gather_16": 0.25}
"""What docs/gpu.md takes for granted: one wavefront of 128 bytes a clock."""
THREADS, UNROLL, ROUNDS = 512, 16, 4096
STORE = "bf16 store"
ENCODED = (1, 128, 16384)  # tokens


def build_command(arch: str, target: Path) -> list[str]:
    command = ["nvcc", "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), f"-arch=sm_{arch}"]
    return [*command, "-Xcompiler", "-fPIC", "-shared", str(SOURCE), "-o", str(target)]


def load() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    target = ROOT / "build" / "libfibquant_gpu_rates.so"
    target.parent.mkdir(exist_ok=True)
    subprocess.run(build_command(f"{major}{minor}", target), check=True)
    return ctypes.CDLL(str(target))


def per_clock(library: ctypes.CDLL, op: str) -> float:
    """Warp instructions per clock and multiprocessor: the median over multiprocessors."""
    ctas = torch.cuda.get_device_properties(0).multi_processor_count
    cycles = torch.zeros(ctas, dtype=torch.int64, device="cuda")
    out = torch.empty(ctas * THREADS, dtype=torch.int32, device="cuda")
    for _ in range(2):  # the first warms up
        torch.cuda.synchronize()
        error = library.fq_rate(
            OPS.index(op), ROUNDS, ctas, ctypes.c_void_p(cycles.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        torch.cuda.synchronize()
        if error:
            raise RuntimeError(f"fq_rate: {op} must run, got CUDA error {error}")
    return THREADS // 32 * UNROLL * ROUNDS / float(cycles.double().median())


def read_rate(library: ctypes.CDLL, milliseconds: Callable[..., float], repetitions: int) -> float:
    """Bytes per millisecond of reading 1 GiB once."""
    x = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    ctas = 4 * torch.cuda.get_device_properties(0).multi_processor_count

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        error = library.fq_read(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctas,
            ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(stream),
        )  # fmt: skip
        if error:
            raise RuntimeError(f"fq_read: must run, got CUDA error {error}")

    return x.numel() / milliseconds(run, repetitions)


def micro_rates(milliseconds: Callable[..., float], repetitions: int) -> Iterator[dict[str, Any]]:
    library = load()
    for op in OPS:
        row = {"rate": op, "per_clock_and_sm": per_clock(library, op)}
        yield {**row, "predicted": PREDICTED[op]} if op in PREDICTED else row
    yield {"rate": "read", "gb_per_s": read_rate(library, milliseconds, repetitions) / 1e6}


def encodes(device: str, presets: list[str]) -> Iterator[tuple[dict[str, Any], Callable]]:
    """(row, call) of encoding keys and values of 8 KV heads, and of vLLM's bfloat16 store."""
    from vllm_fibquant import ops
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.ops import Pages, gpu

    most = ENCODED[-1] if device == "cuda" else 32
    case = Case(128, 8, 1, 1, most, device)
    key = torch.randn(most, 8, 128, device=device).bfloat16()

    def store(slots: torch.Tensor, caches: list[torch.Tensor]) -> Callable:
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash,
        )

        one = torch.ones(1, device=device)
        now = key[: len(slots)]
        return lambda: triton_reshape_and_cache_flash(now, now, *caches, slots, "auto", one, one)

    for tokens in ENCODED:
        slots = torch.arange(min(tokens, most), device=device)
        now = key[: len(slots)]
        pages = [torch.zeros(most // BLOCK_SIZE, BLOCK_SIZE, 8, 128, device=device).bfloat16()
                 for _ in range(2)]  # fmt: skip
        yield {"rate": "encode", "preset": STORE, "tokens": tokens}, store(slots, pages)
        for preset in presets:
            codec = KVCodec.from_preset(preset, 128)
            cache = make_cache(case, codec)
            row = {"rate": "encode", "preset": preset, "tokens": tokens}
            pages = Pages(cache, codec, None, gpu.choose(codec, cache))
            if device == "cuda":
                row["kernel"] = pages.kernels.name
            yield row, functools.partial(ops.encode_kv, now, now, slots, pages)
