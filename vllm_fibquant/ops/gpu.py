# SPDX-License-Identifier: Apache-2.0
"""The GPU side of the door: checks the arguments of `ops` on a GPU, then launches a kernel.

The CUDA library (`native_cuda`) is taken where it is built, runs on the device and has the codec;
the Triton kernels everywhere else, and for the raw new tokens of a batch.

Nothing is read back to the host, so what a host cannot know is not raised: vectors with NaN or
infinity, and slots outside the cache, are counted on the device (`counters`), and a block number
outside the cache gives NaN in its request's rows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops import checks, native_cuda

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's tree; this layer works without vLLM

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MAX_GROUP_SIZE = 64


@functools.lru_cache(maxsize=64)
def unsupported_codec(codec: KVCodec) -> str | None:
    """Why the GPU kernels cannot take this codec, or None when they can."""
    from vllm_fibquant.kernels.tables import unsupported_code

    if not MIN_HEAD_DIM <= codec.head_dim <= MAX_HEAD_DIM:
        return (
            f"head_dim must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} on a GPU, got {codec.head_dim}"
        )
    if codec.key.num_lists or codec.value.num_lists:
        return "num_lists must be 0 on a GPU, whose search is exhaustive; give num_lists 0"
    if codec.key.spec.gain_bits != 16 or codec.value.spec.gain_bits != 16:
        return "gain_bits must be 16 on a GPU, got 8; leave it out"
    if not torch.equal(codec.key.rotation.matrix, codec.value.rotation.matrix):
        return "key and value must share one rotation on a GPU, got two"
    return unsupported_code(codec)


def kernel_name(cache: torch.Tensor, codec: KVCodec) -> str:
    """What serves this codec on the cache's device: ``cuda`` or ``triton``.

    Says once, as a warning, why Triton serves on a GPU.
    """
    at = (codec, cache.device, cache.data_ptr(), cache.shape, cache.stride())
    name = _chosen.get(at)
    if name is None:
        reason = why_not_cuda(cache, codec)
        if reason and cache.is_cuda:
            _warn_of_triton(reason)
        if len(_chosen) >= native_cuda.MAX_LAYERS:  # caches that are gone
            _chosen.clear()
        name = _chosen[at] = "triton" if reason else "cuda"
    return name


_chosen: dict[tuple[Any, ...], str] = {}


@functools.cache
def _warn_of_triton(reason: str) -> None:
    logger.warning(
        "FibQuant serves with its Triton kernels, which are slower than --kv-cache-dtype auto: %s",
        reason,
    )


def why_not_cuda(cache: torch.Tensor, codec: KVCodec) -> str | None:
    """Why the CUDA library does not serve this codec and cache, or None when it does.

    Raises:
        RuntimeError: the library is there but does not load or was built from other sources.
    """
    if not native_cuda.is_built():
        return "the CUDA library is not built (`make cuda`)"
    reason = _why_not_on(cache.device)
    if reason:
        return f"the CUDA library cannot run on {cache.device}: {reason}"
    support = native_cuda.library().support
    return support.unsupported(codec) or native_cuda.unsupported_cache(cache)


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it is no GPU"
    with _current(device):
        return native_cuda.library().why_unusable()


@functools.cache
def counters(device: torch.device) -> torch.Tensor:
    """int32 [2] on `device`, since the process began: vectors stored as zeros because they held a
    NaN or infinity, and vectors not stored because their slot lay outside the cache."""
    return torch.zeros(2, dtype=torch.int32, device=device)


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    codec: KVCodec,
) -> int:
    """See `ops.encode_kv`. Returns 0: `counters` counts on the device.

    Raises:
        ValueError: an argument's shape, dtype, layout or device.
    """
    checks.check_encode(key, value, cache, slot_mapping, codec)
    _check_gpu("encode_kv", cache, codec)
    if kernel_name(cache, codec) == "cuda":
        with _current(cache.device):
            native_cuda.library().encode_kv(
                key, value, cache, slot_mapping, codec, counters(cache.device)
            )
        return 0
    from vllm_fibquant.kernels import encode

    encode.encode_kv(key, value, cache, slot_mapping, codec, counters(cache.device))
    return 0


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    codec: KVCodec,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    raw_key: torch.Tensor | None = None,
    raw_value: torch.Tensor | None = None,
    **unsupported: Any,
) -> None:
    """See `ops.paged_attention`.

    Raises:
        ValueError: an argument's shape, dtype, layout or device, or an option GPUs do not have.
    """
    name = "paged_attention"
    for option, setting in unsupported.items():
        _require(setting is None, name, option, "left out on a GPU", "a value")
    checks.check_attention(
        query, cache, codec, query_start_loc, seq_lens, block_table, out, window=window,
        soft_cap=soft_cap, sinks=sinks, raw_key=raw_key, raw_value=raw_value,
    )  # fmt: skip
    _check_gpu(name, cache, codec)
    group_size = query.shape[1] // cache.shape[1]
    _require(
        group_size <= MAX_GROUP_SIZE, name, "query", f"at most {MAX_GROUP_SIZE} heads per KV head",
        group_size,
    )  # fmt: skip
    if seq_lens.shape[0] == 0 or query.shape[0] == 0:
        return
    if kernel_name(cache, codec) == "cuda":
        raw_states = None
        if raw_key is not None and raw_value is not None:
            from vllm_fibquant.kernels.attention import raw_token_states

            raw_states = raw_token_states(
                query, raw_key, raw_value, query_start_loc, seq_lens, scale=scale, window=window,
                soft_cap=soft_cap,
            )  # fmt: skip
        with _current(cache.device):
            native_cuda.library().paged_attention(
                query, cache, codec, query_start_loc, seq_lens, block_table, out, scale=scale,
                window=window, soft_cap=soft_cap, sinks=sinks, raw_states=raw_states,
            )  # fmt: skip
        return
    from vllm_fibquant.kernels import attention

    attention.paged_attention(
        query, cache, codec, query_start_loc, seq_lens, block_table, out, scale=scale,
        window=window, soft_cap=soft_cap, sinks=sinks, raw_key=raw_key, raw_value=raw_value,
    )  # fmt: skip


def reserve(query: torch.Tensor, raw: bool) -> None:
    """See `ops.reserve`.

    Args:
        query: [num_tokens, num_q_heads, head_dim] of the largest step.
        raw: whether new tokens will be attended raw.
    """
    from vllm_fibquant.kernels.attention import workspace_floats

    # A step of many rows has enough row blocks to need no splits.
    floats = workspace_floats(query.shape[0] * query.shape[1], query.shape[2], 1, raw)
    torch.empty(floats, dtype=torch.float32, device=query.device)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


def _require(is_met: bool, function: str, name: str, must: str, got: Any) -> None:
    if not is_met:
        raise ValueError(f"{function}: {name} must be {must}, got {got}; see ops.{function}")


def _check_gpu(function: str, cache: torch.Tensor, codec: KVCodec) -> None:
    """What the GPU kernels need beside what every device needs (`checks`)."""
    reason = unsupported_codec(codec)
    if reason:
        raise ValueError(f"{function}: {reason}; use another preset or the CPU")
    _require(
        cache.data_ptr() % 2 == 0 and cache.stride(0) % 2 == cache.stride(1) % 2 == 0, function,
        "cache", "at even addresses", f"strides {cache.stride()}",
    )  # fmt: skip
