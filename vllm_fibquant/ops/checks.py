# SPDX-License-Identifier: Apache-2.0
"""What is required of the operations' arguments on every device; see `call` for when it is checked.

Each check raises ValueError, naming the argument, what it must be and what it is. All tensors must
be on the cache's device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops.features import FEATURES
from vllm_fibquant.ops.kernels import Kernels

if TYPE_CHECKING:
    from vllm_fibquant.ops.call import Attend, Batch, Copied, Copies, Fresh, Pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Combinations that have passed; each is an entry of a few hundred bytes.
_MAX_PASSED = 4096
_passed: set[tuple[Any, ...]] = set()


def _look(x: torch.Tensor) -> tuple[Any, ...]:
    """What is checked of a tensor."""
    return x.shape, x.stride(), x.dtype, x.device


def _pass(kind: tuple[Any, ...]) -> None:
    if len(_passed) >= _MAX_PASSED:
        _passed.clear()
    _passed.add(kind)


def check_encode(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor | None,
    copied: Copied | None = None,
) -> None:
    """Checks the arguments of `ops.encode_kv`."""
    # `_look` written out, and compared with the last call before it is hashed: every layer of every
    # step pays for this.
    given = (
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        slot_mapping.shape, slot_mapping.stride(), slot_mapping.dtype, slot_mapping.device,
        None if positions is None else _look(positions),
        None if copied is None else tuple(map(_look, (*copied.copies[:2], copied.rows))),
    )  # fmt: skip
    if given == pages.encoded:
        return
    kind = pages.kind, given
    if kind in _passed:
        pages.encoded = given
        return
    name, device, heads = "encode_kv", pages.cache.device, pages.num_kv_heads
    for which, x in (("key", key), ("value", value)):
        _check_vectors(name, which, x, heads, pages)
    if key.dtype != value.dtype or key.shape != value.shape:
        raise ValueError(
            f"encode_kv: value must have key's dtype and shape {key.dtype} {list(key.shape)}, "
            f"got {value.dtype} {list(value.shape)}"
        )
    check_integers(name, "slot_mapping", slot_mapping, torch.int64, 1, device)
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"encode_kv: slot_mapping must have at most key's {key.shape[0]} entries, "
            f"got {slot_mapping.shape[0]}"
        )
    if pages.key_map is not None:
        if positions is None or positions.shape[0] < slot_mapping.shape[0]:
            raise ValueError(
                "encode_kv: positions must be given with key_map, one for each of "
                f"{slot_mapping.shape[0]} slots, got "
                f"{None if positions is None else list(positions.shape)}"
            )
        check_integers(name, "positions", positions, torch.int64, 1, device)
    if copied is not None:
        _check_copied(copied, pages, slot_mapping.shape[0])
    _pass(kind)
    pages.encoded = given


def _check_copied(copied: Copied, pages: Pages, num_slots: int) -> None:
    if "encoding" not in pages.kernels.copies_while:
        raise ValueError(
            f"encode_kv: copied must be None with the {pages.kernels.name} kernels, which copy new "
            "tokens when all are attended; give Batch.new_rows"
        )
    check_integers("encode_kv", "copied.rows", copied.rows, torch.int32, 1, pages.cache.device)
    if copied.rows.shape[0] < num_slots:
        raise ValueError(
            f"encode_kv: copied.rows must have a row for each of {num_slots} slots, got "
            f"{copied.rows.shape[0]}"
        )
    _check_copies("encode_kv", copied.copies, pages)
    if not (copied.copies.key.is_contiguous() and copied.copies.value.is_contiguous()):
        raise ValueError("encode_kv: copied.copies must be contiguous, got others")


def _check_copies(function: str, copies: Copies, pages: Pages) -> None:
    for which, x in (("key", copies.key), ("value", copies.value)):
        dtypes = pages.kernels.copy_dtypes if which == "key" else (copies.key.dtype,)
        _check_vectors(function, f"copies.{which}", x, pages.num_kv_heads, pages, dtypes)
    if copies.key.shape != copies.value.shape:
        raise ValueError(
            f"{function}: copies.value must have copies.key's shape {list(copies.key.shape)}, got "
            f"{list(copies.value.shape)}"
        )


def check_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None,
) -> None:
    """Checks the arguments of `ops.paged_attention`."""
    if query.shape[0] < batch.num_rows:
        raise ValueError(
            f"paged_attention: query must have the {batch.num_rows} rows of query_start_loc, got "
            f"{query.shape[0]}"
        )
    given = fresh and tuple(x if x is None else _look(x) for x in fresh)
    columns = None if batch.copy_table is None else batch.copy_table.shape[1]
    copied = columns, batch.new_rows is None
    kind = pages.kind, attend.kind, batch.device, copied, _look(query), _look(out), given
    if kind not in _passed:
        _check_shapes(query, out, pages, batch, attend, fresh)
        _pass(kind)


def check_pair(pages: Pages, attend: Attend) -> None:
    """Checks that a layer may attend so to its pages; asked for when the two first meet."""
    name, num_sinks = "paged_attention", attend.kind[0]
    require_features(name, pages.kernels, attend.asked)
    if attend.keep_first > 0 and pages.key_map is not None:
        raise ValueError(f"{name}: keep_first must be 0 with key_map, got {attend.keep_first}")
    if num_sinks and attend.sinks is not None and attend.sinks.device != pages.cache.device:
        raise ValueError(
            f"{name}: sinks must be on {pages.cache.device}, got them on {attend.sinks.device}"
        )
    if attend.copies is not None:
        _check_copies(name, attend.copies, pages)


def _check_shapes(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None,
) -> None:
    raw_key, raw_value, first_query = fresh or (None, None, None)
    name, heads, rows = "paged_attention", pages.num_kv_heads, query.shape[0]
    num_q_heads = query.shape[1] if query.dim() == 3 else -1
    if num_q_heads <= 0 or num_q_heads % heads:
        raise ValueError(
            f"{name}: query must be [num_tokens, a multiple of {heads} heads, "
            f"{pages.codec.head_dim}], got {list(query.shape)}"
        )
    most = pages.kernels.max_group_size
    if most is not None and num_q_heads > most * heads:
        raise ValueError(
            f"{name}: query must have at most {most} heads per KV head, got {num_q_heads // heads}"
        )
    given = (("query", query, num_q_heads), ("out", out, num_q_heads),
             ("raw_key", raw_key, heads), ("raw_value", raw_value, heads),
             ("first_query", first_query, num_q_heads))  # fmt: skip
    for which, x, num_heads in given:
        if x is None:
            continue
        dtypes = DTYPES if which == "query" else (query.dtype,)
        _check_vectors(name, which, x, num_heads, pages, dtypes)
        if x.shape[0] < rows:
            raise ValueError(f"{name}: {which} must have query's {rows} rows, got {x.shape[0]}")
    if batch.device != pages.cache.device:
        raise ValueError(
            f"{name}: batch must be on the cache's {pages.cache.device}, got {batch.device}"
        )
    if attend.kind[0] not in (0, num_q_heads):
        raise ValueError(f"{name}: sinks must be of {num_q_heads} heads, got {attend.kind[0]}")
    if (raw_key is None) != (raw_value is None):
        raise ValueError(f"{name}: raw_key and raw_value must be given together")
    if attend.keep_first > 0 and raw_key is not None:
        raise ValueError(f"{name}: keep_first must be 0 with raw_key, got {attend.keep_first}")
    if first_query is not None and attend.keep_first == 0:
        raise ValueError(f"{name}: first_query must come with a keep_first above 0, got 0")
    require_features(name, pages.kernels, [] if raw_key is None else ["raw"])
    if batch.copy_table is not None:
        if attend.copies is None or raw_key is None:
            raise ValueError(
                f"{name}: copy_table must come with copies and raw_key, got "
                f"{'no copies' if attend.copies is None else 'no raw_key'}"
            )
        if not 0 <= attend.copies.num_first <= batch.copy_table.shape[1]:
            raise ValueError(
                f"{name}: copy_table must have at least num_first {attend.copies.num_first} "
                f"columns, got {batch.copy_table.shape[1]}"
            )
        if batch.new_rows is not None and "attending" not in pages.kernels.copies_while:
            raise ValueError(
                f"{name}: new_rows must be None with the {pages.kernels.name} kernels, which copy "
                "new tokens when they are encoded; give encode_kv copied"
            )


def check_cache(cache: torch.Tensor, codec: KVCodec) -> None:
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
            f"pages_of: cache must be uint8 [num_blocks, num_kv_heads, block_size, "
            f"{record_bytes}] with contiguous records, got {cache.dtype} {list(shape)} "
            f"with strides {stride}"
        )


def require_features(function: str, kernels: Kernels, asked: list[str]) -> None:
    for name in asked:
        if name not in kernels.features:
            row = FEATURES[name]
            raise ValueError(
                f"{function}: {name} ({row.what}) must be left out with the {kernels.name} "
                f"kernels, which do not have it; {', '.join(row.had_by)} do"
            )


def _check_vectors(
    function: str,
    name: str,
    x: torch.Tensor,
    num_heads: int,
    pages: Pages,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    shape, head_dim, device = x.shape, pages.codec.head_dim, pages.cache.device
    if (
        len(shape) != 3
        or shape[1] != num_heads
        or shape[2] != head_dim
        or x.stride()[2] != 1
        or x.dtype not in dtypes
        or x.device != device
    ):
        raise ValueError(
            f"{function}: {name} must be [num_tokens, {num_heads}, {head_dim}] of "
            f"{' or '.join(map(str, dtypes))} on {device} with a contiguous last axis, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}"
        )


def check_integers(
    function: str,
    name: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    num_axes: int,
    device: torch.device,
) -> None:
    if (
        x.dtype != dtype
        or x.dim() != num_axes
        or (x.stride()[-1] != 1 and x.numel())
        or x.device != device
    ):
        raise ValueError(
            f"{function}: {name} must be {dtype} with {num_axes} axes on {device}, the last "
            f"contiguous, got {x.dtype} {list(x.shape)} on {x.device}"
        )
