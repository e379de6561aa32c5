# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve: the C++ library CPU tensors, the CUDA library or Triton those on a GPU. The
oracle (`reference`) serves nobody but tests and the self-check.
"""

from __future__ import annotations

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops import cpu, gpu, reference
from vllm_fibquant.ops.kernels import Kernels

CPU: Kernels = cpu.Cpu()
REFERENCE = reference.Reference()


def choose(codec: KVCodec, cache: torch.Tensor) -> Kernels:
    """The kernels for a codec and the device of a cache.

    Raises:
        ValueError: they cannot serve this codec or this cache.
        RuntimeError: their library is not built or does not load.
    """
    kernels = gpu.choose(codec, cache) if cache.is_cuda else CPU
    if reason := kernels.refuses(codec, cache):
        raise ValueError(f"pages_of: {reason}; use another preset or device")
    return kernels


def kernel_name() -> str:
    """The kernel that serves on this machine's CPU: ``cpu-avx512``, ``cpu-avx2``, ``cpu-portable``;
    what serves a layer is its `Pages.kernels.name`.

    Raises:
        RuntimeError: the library is not built or does not load.
    """
    return CPU.name


def unsupported_codec(codec: KVCodec, device_type: str = "cpu") -> str | None:
    """Why the kernels of a type of device cannot take this codec, or None when they can."""
    return (gpu.TRITON if device_type == "cuda" else CPU).refuses(codec)


def reserve(query: torch.Tensor, raw: bool) -> None:
    """Takes and frees the memory `paged_attention` would need beside its arguments.

    For an engine that measures its peak with a step in which nothing is attended. On a CPU, whose
    scratch memory is small and kept from call to call, nothing is done.
    """
    if query.is_cuda:
        gpu.reserve(query, raw)
