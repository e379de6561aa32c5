# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels in their emulator: a library with the CUDA library's C ABI, built by g++."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch

from tests.paged import Paged
from vllm_fibquant.ops import native_cuda
from vllm_fibquant.ops.native_cuda import Library, workspace_floats

ROOT = Path(__file__).parent.parent
PATH = ROOT / "build" / "libfibquant_cuda_emulated.so"
SHARED = (99 << 10, 100 << 10)
"""Shared memory of a CTA and of a multiprocessor of the emulated device: those of sm_86."""


@functools.cache
def emulated() -> Library:
    """The library, built if it is not newer than its sources."""
    command = [sys.executable, "setup.py", "--quiet", "build_cuda", "--emulated"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    library = Library(PATH)
    options(library)
    return library


def options(
    library: Library, reversed_order: bool = False, shared: tuple[int, int] = SHARED
) -> None:
    """Order in which emulated threads run, and shared memory of the device."""
    library.lib.fq_emulator_options(int(reversed_order), *shared)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy at a multiple of 64 bytes, as device memory is."""
    buffer = torch.empty(x.numel() + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + x.numel()].view(x.shape).copy_(x)


def attend(library: Library, paged: Paged, *, num_splits: int = 2, wide=False, **options):
    """The kernels' answer, from scratch memory that holds NaN."""
    rows, head_dim = paged.query.shape[0] * paged.query.shape[1], paged.codec.head_dim
    device = native_device(library)
    on = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    out = torch.full_like(paged.query, torch.nan, device=device)
    workspace = torch.full(
        (workspace_floats(rows, head_dim, num_splits),), torch.nan, device=device
    )
    cache = aligned(paged.cache) if device.type == "cpu" else paged.cache.to(device)
    library.paged_attention(
        paged.query.to(device), cache, paged.codec, paged.query_start_loc.to(device),
        paged.seq_lens.to(device), paged.block_table.to(device), out, scale=paged.scale,
        num_splits=num_splits, wide=wide, workspace=workspace, **on,
    )  # fmt: skip
    return out.cpu()


def native_device(library: Library) -> torch.device:
    """Where the library's kernels run."""
    is_cuda = native_cuda.is_built() and library is native_cuda.library()
    return torch.device("cuda" if is_cuda else "cpu")
