# SPDX-License-Identifier: Apache-2.0
"""The GPU side of the door: checks the arguments of `ops` on a GPU, then launches Triton kernels.

Nothing is read back to the host, so what a host cannot know is not raised: vectors with NaN or
infinity, and slots outside the cache, are counted on the device (`counters`), and a block number
outside the cache gives NaN in its request's rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_fibquant.codec import KVCodec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MAX_GROUP_SIZE = 64


def unsupported_codec(codec: KVCodec) -> str | None:
    """Why the GPU kernels cannot take this codec, or None when they can."""
    from vllm_fibquant.kernels.tables import unsupported_code

    if not MIN_HEAD_DIM <= codec.head_dim <= MAX_HEAD_DIM:
        return (
            f"head_dim must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} on a GPU, got {codec.head_dim}"
        )
    if codec.key.num_lists or codec.value.num_lists:
        return "num_lists must be 0 on a GPU, whose search is exhaustive; give num_lists 0"
    return unsupported_code(codec)


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
    from vllm_fibquant.kernels import encode

    name = "encode_kv"
    _check_cache(name, cache, codec)
    _check_vectors(name, "key", key, cache, cache.shape[1], codec.head_dim)
    _check_vectors(name, "value", value, cache, cache.shape[1], codec.head_dim, key.dtype)
    _check_integers(name, "slot_mapping", slot_mapping, cache, torch.int64, 1)
    _require(
        slot_mapping.shape[0] <= key.shape[0] == value.shape[0], name, "slot_mapping",
        "at most as long as key, and value as long as key",
        f"{slot_mapping.shape[0]}, {key.shape[0]} and {value.shape[0]}",
    )  # fmt: skip
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
    from vllm_fibquant.kernels import attention

    name = "paged_attention"
    for option, setting in unsupported.items():
        _require(setting is None, name, option, "left out on a GPU", "a value")
    _check_cache(name, cache, codec)
    num_kv_heads = cache.shape[1]
    num_heads = query.shape[1] if query.dim() == 3 else 0
    _require(
        num_heads > 0 and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= MAX_GROUP_SIZE, name, "query",
        f"[num_tokens, 1 to {MAX_GROUP_SIZE} times {num_kv_heads} heads, {codec.head_dim}]",
        list(query.shape),
    )  # fmt: skip
    _check_vectors(name, "query", query, cache, num_heads, codec.head_dim)
    _check_vectors(name, "out", out, cache, num_heads, codec.head_dim, query.dtype)
    _require(out.shape[0] >= query.shape[0], name, "out", "as long as query", list(out.shape))
    raws = (("raw_key", raw_key), ("raw_value", raw_value))
    _require((raw_key is None) == (raw_value is None), name, "raw_key", "given with raw_value", "1")
    for raw_name, raw in raws:
        if raw is not None:
            _check_vectors(name, raw_name, raw, cache, num_kv_heads, codec.head_dim, query.dtype)
            _require(
                raw.shape[0] >= query.shape[0], name, raw_name, "as long as query", list(raw.shape)
            )
    _check_integers(name, "query_start_loc", query_start_loc, cache, torch.int32, 1)
    _check_integers(name, "seq_lens", seq_lens, cache, torch.int32, 1)
    _check_integers(name, "block_table", block_table, cache, torch.int32, 2)
    num_reqs = seq_lens.shape[0]
    _require(
        query_start_loc.shape[0] == num_reqs + 1 and block_table.shape[0] >= num_reqs, name,
        "query_start_loc", f"{num_reqs + 1} entries and block_table at least {num_reqs} rows",
        f"{query_start_loc.shape[0]} and {block_table.shape[0]}",
    )  # fmt: skip
    if sinks is not None:
        _require(
            sinks.dtype == torch.float32 and sinks.shape == (num_heads,) and sinks.is_contiguous()
            and sinks.device == cache.device, name, "sinks",
            f"contiguous float32 [{num_heads}] on {cache.device}",
            f"{sinks.dtype} {list(sinks.shape)} on {sinks.device}",
        )  # fmt: skip
    _require(window >= 0 and soft_cap >= 0, name, "window and soft_cap", "at least 0",
             f"{window} and {soft_cap}")  # fmt: skip
    if num_reqs == 0 or query.shape[0] == 0:
        return
    attention.paged_attention(
        query, cache, codec, query_start_loc, seq_lens, block_table, out, scale=scale,
        window=window, soft_cap=soft_cap, sinks=sinks, raw_key=raw_key, raw_value=raw_value,
    )  # fmt: skip


def _require(is_met: bool, function: str, name: str, must: str, got: Any) -> None:
    if not is_met:
        raise ValueError(f"{function}: {name} must be {must}, got {got}; see ops.{function}")


def _check_cache(function: str, cache: torch.Tensor, codec: KVCodec) -> None:
    reason = unsupported_codec(codec)
    if reason:
        raise ValueError(f"{function}: {reason}; use another preset or the CPU")
    record_bytes = codec.layout.record_bytes
    _require(
        cache.dtype == torch.uint8 and cache.dim() == 4 and cache.shape[3] == record_bytes
        and cache.stride()[2:] == (record_bytes, 1) and cache.data_ptr() % 2 == 0
        and cache.stride(0) % 2 == cache.stride(1) % 2 == 0, function, "cache",
        f"uint8 [num_blocks, num_kv_heads, block_size, {record_bytes}] with contiguous records at "
        "even addresses", f"{cache.dtype} {list(cache.shape)} with strides {cache.stride()}",
    )  # fmt: skip


def _check_vectors(
    function: str,
    name: str,
    x: torch.Tensor,
    cache: torch.Tensor,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype | None = None,
) -> None:
    dtypes = DTYPES if dtype is None else (dtype,)
    _require(
        x.dim() == 3 and x.shape[1:] == (num_heads, head_dim) and x.stride(2) == 1
        and x.dtype in dtypes and x.device == cache.device, function, name,
        f"[num_tokens, {num_heads}, {head_dim}] of {' or '.join(map(str, dtypes))} on "
        f"{cache.device} with a contiguous last axis",
        f"{x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}",
    )  # fmt: skip


def _check_integers(
    function: str,
    name: str,
    x: torch.Tensor,
    cache: torch.Tensor,
    dtype: torch.dtype,
    num_axes: int,
) -> None:
    _require(
        x.dtype == dtype and x.dim() == num_axes and (x.numel() == 0 or x.stride(-1) == 1)
        and x.device == cache.device, function, name,
        f"{dtype} with {num_axes} axes on {cache.device}, the last contiguous",
        f"{x.dtype} {list(x.shape)} on {x.device}",
    )  # fmt: skip
