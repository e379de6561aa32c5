# SPDX-License-Identifier: Apache-2.0
"""What the ops require of their arguments on every device; a door adds what its kernels require.

Each check raises ValueError, naming the function, the argument, what it must be and what it got.
All tensors must be on the cache's device.
"""

from __future__ import annotations

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops.reference import TokenCopies

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_encode(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    codec: KVCodec,
    key_map: KeyMap | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Checks the arguments of `ops.encode_kv`."""
    _check_cache("encode_kv", cache, codec)
    for name, x in (("key", key), ("value", value)):
        _check_vectors("encode_kv", name, x, cache, codec, cache.shape[1])
    if key.dtype != value.dtype or key.shape != value.shape:
        raise ValueError(
            f"encode_kv: value must have key's dtype and shape {key.dtype} {list(key.shape)}, "
            f"got {value.dtype} {list(value.shape)}"
        )
    _check_integers("encode_kv", "slot_mapping", slot_mapping, cache, torch.int64, 1)
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"encode_kv: slot_mapping must have at most key's {key.shape[0]} entries, "
            f"got {slot_mapping.shape[0]}"
        )
    _check_key_map("encode_kv", key_map, cache, codec)
    if key_map is not None and key_map.turning is not None:
        if positions is None or positions.shape != slot_mapping.shape:
            raise ValueError(
                "encode_kv: positions must be given with key_map.turning, one for each of "
                f"{slot_mapping.shape[0]} slots, got "
                f"{None if positions is None else list(positions.shape)}"
            )
        _check_integers("encode_kv", "positions", positions, cache, torch.int64, 1)


def check_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    codec: KVCodec,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    raw_key: torch.Tensor | None,
    raw_value: torch.Tensor | None,
    copies: TokenCopies | None = None,
    keep_first: int = 0,
    first_query: torch.Tensor | None = None,
    key_map: KeyMap | None = None,
) -> None:
    """Checks the arguments of `ops.paged_attention`."""
    name = "paged_attention"
    _check_cache(name, cache, codec)
    num_kv_heads = cache.shape[1]
    num_q_heads = query.shape[1] if query.dim() == 3 else -1
    if num_q_heads <= 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{name}: query must be [num_tokens, a multiple of {num_kv_heads} heads, "
            f"{codec.head_dim}], got {list(query.shape)}"
        )
    _check_vectors(name, "query", query, cache, codec, num_q_heads)
    _check_vectors(name, "out", out, cache, codec, num_q_heads, query.dtype)
    if out.shape[0] < query.shape[0]:
        raise ValueError(f"{name}: out must have query's {query.shape[0]} rows, got {out.shape[0]}")
    for raw_name, raw in (("raw_key", raw_key), ("raw_value", raw_value)):
        if raw is not None:
            _check_vectors(name, raw_name, raw, cache, codec, num_kv_heads, query.dtype)
            if raw.shape[0] < query.shape[0]:
                raise ValueError(
                    f"{name}: {raw_name} must have query's {query.shape[0]} rows, "
                    f"got {raw.shape[0]}"
                )
    if (raw_key is None) != (raw_value is None):
        raise ValueError(f"{name}: raw_key and raw_value must be given together")
    if copies is not None:
        _check_copies(name, copies, cache, codec, seq_lens.shape[0], raw_key)
    if keep_first < 0 or (keep_first > 0 and raw_key is not None):
        raise ValueError(
            f"{name}: keep_first must be at least 0, and 0 with raw_key, got {keep_first}"
        )
    _check_key_map(name, key_map, cache, codec)
    if keep_first > 0 and key_map is not None:
        raise ValueError(f"{name}: keep_first must be 0 with key_map, got {keep_first}")
    if first_query is not None:
        _check_vectors(name, "first_query", first_query, cache, codec, num_q_heads, query.dtype)
        if keep_first == 0 or first_query.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: first_query must have query's {query.shape[0]} rows and a keep_first "
                f"above 0, got {first_query.shape[0]} rows and {keep_first}"
            )
    _check_integers(name, "query_start_loc", query_start_loc, cache, torch.int32, 1)
    _check_integers(name, "seq_lens", seq_lens, cache, torch.int32, 1)
    _check_integers(name, "block_table", block_table, cache, torch.int32, 2)
    num_reqs = seq_lens.shape[0]
    if query_start_loc.shape[0] != num_reqs + 1 or block_table.shape[0] < num_reqs:
        raise ValueError(
            f"{name}: query_start_loc must have {num_reqs + 1} entries and block_table at least "
            f"{num_reqs} rows for {num_reqs} seq_lens, got {query_start_loc.shape[0]} and "
            f"{block_table.shape[0]}"
        )
    if sinks is not None and (
        sinks.dtype != torch.float32
        or sinks.shape != (num_q_heads,)
        or not sinks.is_contiguous()
        or sinks.device != cache.device
    ):
        raise ValueError(
            f"{name}: sinks must be contiguous float32 [{num_q_heads}] on {cache.device}, "
            f"got {sinks.dtype} {list(sinks.shape)} on {sinks.device}"
        )
    if window < 0 or soft_cap < 0:
        raise ValueError(
            f"{name}: window and soft_cap must be at least 0, got {window} and {soft_cap}"
        )


def _check_cache(function: str, cache: torch.Tensor, codec: KVCodec) -> None:
    """Raises ValueError unless `cache` has the shape and layout of the codec's pages."""
    record_bytes = codec.layout.record_bytes
    shape, stride = cache.shape, cache.stride()
    if (
        cache.dtype != torch.uint8
        or len(shape) != 4
        or shape[3] != record_bytes
        or stride[3] != 1
        or stride[2] != record_bytes
    ):
        raise ValueError(
            f"{function}: cache must be uint8 [num_blocks, num_kv_heads, block_size, "
            f"{record_bytes}] with contiguous records, got {cache.dtype} {list(shape)} "
            f"with strides {stride}"
        )


def _check_vectors(
    function: str,
    name: str,
    x: torch.Tensor,
    cache: torch.Tensor,
    codec: KVCodec,
    num_heads: int,
    dtype: torch.dtype | None = None,
) -> None:
    dtypes = DTYPES if dtype is None else (dtype,)
    shape = x.shape
    if (
        len(shape) != 3
        or shape[1] != num_heads
        or shape[2] != codec.head_dim
        or x.stride()[2] != 1
        or x.dtype not in dtypes
        or x.device != cache.device
    ):
        raise ValueError(
            f"{function}: {name} must be [num_tokens, {num_heads}, {codec.head_dim}] of "
            f"{' or '.join(map(str, dtypes))} on {cache.device} with a contiguous last axis, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _check_key_map(
    function: str, key_map: KeyMap | None, cache: torch.Tensor, codec: KVCodec
) -> None:
    if key_map is None:
        return
    expected = (cache.shape[1], codec.head_dim)
    if key_map.mean.shape != expected or not cache.is_cpu:
        raise ValueError(
            f"{function}: key_map must be of {expected[0]} KV heads and head_dim {expected[1]}, "
            f"for a cache on the CPU, got {list(key_map.mean.shape)} on {cache.device}"
        )
    if key_map.transform is not None:
        index_bytes = codec.layout.key_index_bytes
        got = key_map.transform.index_bytes
        if got != index_bytes:
            raise ValueError(
                f"{function}: key_map must have a transform to {index_bytes} index bytes, as the "
                f"codec's keys, got one to {got}"
            )


def _check_copies(
    function: str,
    copies: TokenCopies,
    cache: torch.Tensor,
    codec: KVCodec,
    num_reqs: int,
    raw_key: torch.Tensor | None,
) -> None:
    for name, x in (("copies.key", copies.key), ("copies.value", copies.value)):
        _check_vectors(function, name, x, cache, codec, cache.shape[1], copies.key.dtype)
        if not x.is_contiguous():
            raise ValueError(f"{function}: {name} must be contiguous, got strides {x.stride()}")
    table = copies.table
    _check_integers(function, "copies.table", table, cache, torch.int32, 2)
    if (
        table.shape[0] != num_reqs
        or not table.is_contiguous()
        or not 0 <= copies.num_first <= table.shape[1]
    ):
        raise ValueError(
            f"{function}: copies.table must be contiguous with {num_reqs} rows and at least "
            f"num_first {copies.num_first} columns, got {list(table.shape)}"
        )
    if raw_key is None:
        raise ValueError(f"{function}: copies need raw_key, got None; give both or neither")
    tokens, rows = copies.new_tokens, copies.new_rows
    if tokens is None and rows is None:
        return
    if tokens is None or rows is None or tokens.shape != rows.shape:
        shapes = [None if x is None else list(x.shape) for x in (tokens, rows)]
        raise ValueError(
            f"{function}: copies.new_tokens and copies.new_rows must be of one length, "
            f"got {shapes[0]} and {shapes[1]}"
        )
    _check_integers(function, "copies.new_tokens", tokens, cache, torch.int64, 1)
    _check_integers(function, "copies.new_rows", rows, cache, torch.int64, 1)


def _check_integers(
    function: str,
    name: str,
    x: torch.Tensor,
    cache: torch.Tensor,
    dtype: torch.dtype,
    num_axes: int,
) -> None:
    if (
        x.dtype != dtype
        or x.dim() != num_axes
        or (x.stride()[-1] != 1 and x.numel())
        or x.device != cache.device
    ):
        raise ValueError(
            f"{function}: {name} must be {dtype} with {num_axes} axes on {cache.device}, the last "
            f"contiguous, got {x.dtype} {list(x.shape)} on {x.device}"
        )
