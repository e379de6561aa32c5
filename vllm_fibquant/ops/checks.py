# SPDX-License-Identifier: Apache-2.0
"""What is required of the operations' arguments on every device; see `call` for when it is checked.

Each check raises ValueError, naming the argument, what it must be and what it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_fibquant.ops.features import FEATURES
from vllm_fibquant.ops.kernels import Kernels

if TYPE_CHECKING:
    from vllm_fibquant.ops.call import Attend, Batch, Copied, Copies, Fresh, Pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Axis = int | str | range
"""What an axis of a tensor must be: its length, the lengths it may have, or, where any will do, the
name of what it counts."""

# Combinations that have passed; each is an entry of a few hundred bytes.
_MAX_PASSED = 4096
_passed: set[tuple[Any, ...]] = set()

# The tensors that the layers of a step share, and what `_look` says of them. They are known again
# by being the same objects, which nobody may resize; the next step's take their place.
_step: tuple[Any, Any, Any] = None, None, None


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
    global _step
    step = _step  # once: another thread may replace it
    if slot_mapping is step[0] and positions is step[1]:
        shared = step[2]
    else:
        shared = _look(slot_mapping), None if positions is None else _look(positions)
        _step = slot_mapping, positions, shared
    given = (
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device, shared,
        None if copied is None else tuple(map(_look, (*copied.copies[:2], copied.rows))),
    )  # fmt: skip
    if given == pages.encoded:
        return
    kind = pages.kind, given
    if kind not in _passed:
        check = functools.partial(check_tensor, "encode_kv", device=pages.cache.device)
        check("key", key, ("num_tokens", pages.num_kv_heads, pages.codec.head_dim), *DTYPES)
        check("value", value, key.shape, key.dtype)
        check("slot_mapping", slot_mapping, (range(len(key) + 1),), torch.int64)
        num_slots = slot_mapping.shape[0]
        if pages.key_map is not None:
            check("positions", positions, (at_least(num_slots),), torch.int64)
        if copied is not None:
            if "encoding" not in pages.kernels.copies_while:
                raise ValueError(
                    f"encode_kv: copied must be None with the {pages.kernels.name} kernels, which "
                    "copy new tokens when all are attended; give Batch.new_rows"
                )
            check("copied.rows", copied.rows, (at_least(num_slots),), torch.int32)
            _check_copies("encode_kv", copied.copies, pages)
        _pass(kind)
    pages.encoded = given


def _check_copies(function: str, copies: Copies, pages: Pages) -> None:
    check = functools.partial(check_tensor, function, device=pages.cache.device, num_packed=3)
    shape = "num_rows", pages.num_kv_heads, pages.codec.head_dim
    check("copies.key", copies.key, shape, *pages.kernels.copy_dtypes)
    check("copies.value", copies.value, copies.key.shape, copies.key.dtype)


def check_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None,
) -> None:
    """Checks the arguments of `ops.paged_attention`."""
    given = (
        query.shape, query.stride(), query.dtype, query.device,
        out.shape, out.stride(), out.dtype, out.device,
        fresh and tuple(x if x is None else _look(x) for x in fresh), batch.kind, pages.kind,
    )  # fmt: skip
    if given[0][0] < batch.num_rows:
        raise ValueError(
            f"paged_attention: query must have the {batch.num_rows} rows of query_start_loc, got "
            f"{query.shape[0]}"
        )
    if given == attend.attended:
        return
    kind = attend.kind, given
    if kind not in _passed:
        _check_shapes(query, out, pages, batch, attend, fresh)
        _pass(kind)
    attend.attended = given


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
    name, device, kernels = "paged_attention", pages.cache.device, pages.kernels
    heads, head_dim = pages.num_kv_heads, pages.codec.head_dim
    check = functools.partial(check_tensor, name, device=device)
    most = heads * (kernels.max_group_size or sys.maxsize // (2 * heads))
    check("query", query, ("num_tokens", range(heads, most + 1, heads), head_dim), *DTYPES)
    num_q_heads, rows = query.shape[1], at_least(query.shape[0])
    check("out", out, (rows, num_q_heads, head_dim), query.dtype)
    for which, x, num_heads in (
        ("raw_key", raw_key, heads),
        ("raw_value", raw_value, heads),
        ("first_query", first_query, num_q_heads),
    ):
        if x is not None:
            check(which, x, (rows, num_heads, head_dim), query.dtype)
    require_features(name, kernels, [] if raw_key is None else ["raw"])
    if batch.device != device:
        raise ValueError(f"{name}: batch must be on the cache's {device}, got {batch.device}")
    if attend.kind[0] not in (0, num_q_heads):
        raise ValueError(f"{name}: sinks must be of {num_q_heads} heads, got {attend.kind[0]}")
    if (raw_key is None) != (raw_value is None):
        raise ValueError(f"{name}: raw_key and raw_value must be given together")
    if attend.keep_first > 0 and raw_key is not None:
        raise ValueError(f"{name}: keep_first must be 0 with raw_key, got {attend.keep_first}")
    if first_query is not None and attend.keep_first == 0:
        raise ValueError(f"{name}: first_query must come with a keep_first above 0, got 0")
    if (table := batch.copy_table) is not None:
        if attend.copies is None or raw_key is None:
            lacking = "copies" if attend.copies is None else "raw_key"
            raise ValueError(
                f"{name}: copy_table must come with copies and raw_key, got no {lacking}"
            )
        if not 0 <= (num_first := attend.copies.num_first) <= (columns := table.shape[1]):
            raise ValueError(f"{name}: num_first must be 0 to {columns}, got num_first {num_first}")
        if batch.new_rows is not None and "attending" not in kernels.copies_while:
            raise ValueError(
                f"{name}: new_rows must be None with the {kernels.name} kernels, which copy new "
                "tokens when they are encoded; give encode_kv copied"
            )


def require_features(function: str, kernels: Kernels, asked: list[str]) -> None:
    for name in asked:
        if name not in kernels.features:
            row = FEATURES[name]
            raise ValueError(
                f"{function}: {name} ({row.what}) must be left out with the {kernels.name} "
                f"kernels, which do not have it; {', '.join(row.had_by)} do"
            )


def check_tensor(
    function: str,
    name: str,
    x: torch.Tensor | None,
    shape: Sequence[Axis],
    *dtypes: torch.dtype,
    device: torch.device | None = None,
    num_packed: int = 1,
) -> torch.Tensor:
    """The tensor, an argument of a function; raises ValueError unless it is as required.

    Args:
        dtypes: those it may have.
        device: where it must be; None for anywhere.
        num_packed: how many of its last axes must be contiguous.
    """
    if (
        x is not None
        and x.dtype in dtypes
        and device in (None, x.device)
        and x.dim() == len(shape)
        and all(map(_fits, shape, x.shape))
        and (x.is_contiguous() or x[(0,) * (x.dim() - num_packed)].is_contiguous())
    ):
        return x
    got = x if x is None else f"{x.dtype} {list(x.shape)} on {x.device}, strides {x.stride()}"
    last = "last axis" if num_packed == 1 else f"last {num_packed} axes"
    raise ValueError(
        f"{function}: {name} must be {' or '.join(map(str, dtypes))} "
        f"[{', '.join(map(_told, shape))}] on {device or 'any device'}, its {last} contiguous, "
        f"got {got}"
    )


def _fits(axis: Axis, length: int) -> bool:
    return length in axis if isinstance(axis, range) else isinstance(axis, str) or axis == length


def at_least(length: int) -> range:
    return range(length, sys.maxsize)


def _told(axis: Axis) -> str:
    if not isinstance(axis, range):
        return str(axis)
    if axis.stop == sys.maxsize:
        return f"at least {axis.start}"
    if axis.stop > 2**31:
        return f"a multiple of {axis.step}"
    return f"at most {axis[-1]}" + (f", a multiple of {axis.step}" if axis.step > 1 else "")
