# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels in their emulator: a library with the CUDA library's C ABI, built by g++."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch

from tests.paged import Paged
from vllm_fibquant.ops import Pages, cuda
from vllm_fibquant.ops.cuda import Cuda, Library

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


def attend(library: Library, paged: Paged, *, num_splits=2, wide=False, raw_states=None, **options):
    """The kernels' answer, from scratch memory that holds NaN."""
    device = native_device(library)

    def allocate(floats: int, device: torch.device) -> torch.Tensor:
        return torch.full((floats,), torch.nan, device=device)

    states = raw_states
    if raw_states is not None and not callable(raw_states):
        states = lambda *_: raw_states  # noqa: E731
    kernels = Cuda(library, num_splits, wide, allocate, states)
    out = torch.full_like(paged.query, torch.nan, device=device)
    cache = aligned(paged.cache) if device.type == "cpu" else paged.cache.to(device)
    pages = Pages(cache, paged.codec, paged.key_map, kernels)
    kernels.paged_attention(paged.query.to(device), out, pages, *paged.split(options, device))
    return out.cpu()


def raw_states(query, batch, attend, fresh) -> tuple[torch.Tensor, ...]:
    """In the place of the Triton kernel: states of every row over its request's new tokens."""
    num_tokens, num_q_heads, head_dim = query.shape
    o = torch.full((num_tokens, num_q_heads, head_dim), torch.nan)
    m, l = torch.full((2, num_tokens, num_q_heads), torch.nan)  # noqa: E741
    bounds = batch.query_start_loc.tolist()
    ends = batch.seq_lens.tolist()
    for begin, end, seq_len in zip(bounds, bounds[1:], ends, strict=False):
        if begin == end:
            continue
        q = query[begin:end].cpu().double()
        k, v = (
            x[begin:end].cpu().double().repeat_interleave(num_q_heads // x.shape[1], 1)
            for x in (fresh.raw_key, fresh.raw_value)
        )
        scores = torch.einsum("qhd,shd->qhs", q, k) * attend.scale
        if attend.soft_cap > 0:
            scores = attend.soft_cap * torch.tanh(scores / attend.soft_cap)
        at = torch.arange(end - begin)
        hidden = at > at[:, None]
        if attend.window > 0:
            hidden |= at <= at[:, None] - attend.window
        if attend.chunk > 0:
            number = (at + seq_len - len(at)) // attend.chunk
            hidden |= number < number[:, None]
        scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
        top = scores.amax(-1)
        weights = (scores - top[..., None]).exp()
        o[begin:end] = torch.einsum("qhs,shd->qhd", weights, v).float()
        m[begin:end], l[begin:end] = top.float(), weights.sum(-1).float()
    found = o.view(-1, head_dim), m.flatten(), l.flatten()
    return tuple(x.to(query.device) for x in found)


def native_device(library: Library) -> torch.device:
    """Where the library's kernels run."""
    is_cuda = cuda.is_built() and library is cuda.library()
    return torch.device("cuda" if is_cuda else "cpu")
