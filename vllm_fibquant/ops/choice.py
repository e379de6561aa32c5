# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve: the C++ library CPU tensors, the CUDA library or Triton those on a GPU. The
oracle (`reference`) takes their place only when `use_reference` asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops import cpu, gpu, reference
from vllm_fibquant.ops.kernels import Kernels

CPU = cpu.Cpu()
REFERENCE = reference.Reference()

_forced_reference = False


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Pages made within this context have the oracle in the place of kernels."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def choose(codec: KVCodec, cache: torch.Tensor) -> Kernels:
    """The kernels for a codec and the device of a cache.

    Raises:
        ValueError: they cannot serve this codec or this cache.
        RuntimeError: their library is not built or does not load.
    """
    if _forced_reference:
        kernels: Kernels = REFERENCE
    elif cache.is_cuda:
        kernels = gpu.choose(codec, cache)
    else:
        kernels = CPU
    if reason := kernels.refuses(codec, cache):
        raise ValueError(f"pages_of: {reason}; use another preset or device")
    return kernels


def kernel_name() -> str:
    """The kernel that serves on this machine's CPU: ``cpu-avx512``, ``cpu-avx2``, ``cpu-portable``,
    or ``reference``; what serves a layer is its `Pages.kernels.name`.

    Raises:
        RuntimeError: the library is not built or does not load.
    """
    return REFERENCE.name if _forced_reference else CPU.name


def unsupported_codec(codec: KVCodec, device_type: str = "cpu") -> str | None:
    """Why the kernels of a type of device cannot take this codec, or None when they can."""
    return (gpu.TRITON if device_type == "cuda" else CPU).refuses(codec)


def reserve(query: torch.Tensor, raw: bool) -> None:
    """Takes and frees the memory `paged_attention` would need beside its arguments.

    For an engine that measures its peak with a step in which nothing is attended. On a CPU, whose
    scratch memory is small and kept from call to call, nothing is done.
    """
    if query.is_cuda and not _forced_reference:
        gpu.reserve(query, raw)
