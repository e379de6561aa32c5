# SPDX-License-Identifier: Apache-2.0
"""GPUs: the Triton kernels as an implementation, and which implementation is taken.

The CUDA library is taken where it is built, runs on the device and has the codec; the Triton
kernels everywhere else, and for raw new tokens that no library takes (`raw_states`).
"""

from __future__ import annotations

import functools
import logging

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops import cuda, raw_states
from vllm_fibquant.ops.call import Attend, Batch, Copied, Fresh, Pages
from vllm_fibquant.ops.checks import check_pair
from vllm_fibquant.ops.features import features_of
from vllm_fibquant.ops.kernels import GpuKernels, Kernels

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's tree; this layer works without vLLM

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


class Triton(GpuKernels):
    """The Triton kernels (`vllm_fibquant/kernels`)."""

    implementation = "triton"

    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        from vllm_fibquant.kernels.tables import unsupported_code

        if not MIN_HEAD_DIM <= codec.head_dim <= MAX_HEAD_DIM:
            return (
                f"head_dim must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} on a GPU, got "
                f"{codec.head_dim}"
            )
        return super().refuses(codec, cache) or unsupported_code(codec)

    def encode_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: Pages,
        positions: torch.Tensor | None = None,
        copied: Copied | None = None,
    ) -> int:
        from vllm_fibquant.kernels import encode

        return encode.encode_kv(key, value, slot_mapping, pages, positions)

    def paged_attention(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        pages: Pages,
        batch: Batch,
        attend: Attend,
        fresh: Fresh | None = None,
    ) -> None:
        from vllm_fibquant.kernels import attention

        if attend.kept is not pages:
            check_pair(pages, attend)
            attend.kept = pages
        attention.paged_attention(query, out, pages, batch, attend, fresh)


TRITON = Triton()


def choose(codec: KVCodec, cache: torch.Tensor) -> Kernels:
    """The kernels that serve this codec on the cache's device.

    Says once, as a warning, why Triton serves on a GPU.
    """
    reason = why_not_cuda(codec, cache)
    if not reason:
        return cuda.kernels()
    if cache.is_cuda:
        _warn_of_triton(reason)
    return TRITON


@functools.cache
def _warn_of_triton(reason: str) -> None:
    logger.warning(
        "FibQuant serves with its Triton kernels, which are slower than --kv-cache-dtype auto: %s",
        reason,
    )


def why_not_cuda(codec: KVCodec, cache: torch.Tensor) -> str | None:
    """Why the CUDA library does not serve this codec and cache, or None when it does.

    Raises:
        RuntimeError: the library is there but does not load or was built from other sources.
    """
    if not cuda.is_built():
        return "the CUDA library is not built (`make cuda`)"
    if reason := _why_not_on(cache.device):
        return f"the CUDA library cannot run on {cache.device}: {reason}"
    return cuda.kernels().refuses(codec, cache)


def why_no_cuda_kernels(codec: KVCodec | None = None) -> str | None:
    """Why the CUDA library cannot be had, or has no kernels for this codec; or None.

    Asks no device: whether one can be used is known where it serves (`why_not_cuda`).
    """
    if not cuda.is_built():
        return "the CUDA library is not built (`make cuda`)"
    try:
        kernels = cuda.kernels()
    except RuntimeError as error:
        return str(error)
    return None if codec is None else kernels.refuses(codec)


def why_no_maps(head_dim: int) -> str | None:
    """Why keys of this head_dim cannot be mapped on a GPU, or None; asks no device.

    The CUDA library has maps of keys, Triton has none.
    """
    if reason := why_no_cuda_kernels():
        return reason
    known = cuda.kernels().library.support.wide_columns
    if head_dim in known:
        return None
    return f"the CUDA library has head_dim {', '.join(map(str, known))}, not {head_dim}"


def features(head_dim: int) -> frozenset[str]:
    """The features that a GPU has for vectors of this head_dim."""
    both = features_of("cuda") & features_of("triton")
    return both if why_no_maps(head_dim) else features_of("cuda")


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it is no GPU"
    with cuda.current(device):
        return cuda.kernels().library.why_unusable()


def reserve(query: torch.Tensor, raw: bool) -> None:
    """See `ops.reserve`.

    Args:
        query: [num_tokens, num_q_heads, head_dim] of the largest step.
        raw: whether new tokens will be attended raw.
    """
    from vllm_fibquant.kernels.attention import workspace_floats

    num_rows, head_dim = query.shape[0] * query.shape[1], query.shape[2]
    # A step of many rows has enough row blocks to need no splits.
    floats = workspace_floats(num_rows, head_dim, 1)
    if not why_no_maps(head_dim):
        floats = max(floats, num_rows * cuda.most_prepared_floats(head_dim))
    if raw:
        floats += raw_states.most_floats(num_rows, head_dim)
    torch.empty(floats, dtype=torch.float32, device=query.device)
