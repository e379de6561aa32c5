# SPDX-License-Identifier: Apache-2.0
"""Attention over codes with 16-bit copies of a request's first and newest tokens."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.ops.test_attention import check_against_oracle, codec_of
from tests.paged import Paged, make_paged, use_reference
from vllm_fibquant.ops import Copies


def make_copies(
    paged: Paged, num_first: int, num_recent: int, dtype: torch.dtype, share: float = 1.0
) -> tuple[Copies, torch.Tensor]:
    """Copies of a random `share` of the tokens in reach, in shuffled rows among poisoned ones."""
    generator = torch.Generator().manual_seed(7)
    lens, new = paged.seq_lens.tolist(), paged.query_start_loc.diff().tolist()
    table = torch.full((len(lens), num_first + num_recent), -1, dtype=torch.int32)
    order = torch.randperm(2 * table.numel() + 1, generator=generator)
    key = torch.full((len(order), *paged.key.shape[1:]), torch.nan, dtype=dtype)
    value = key.clone()
    begin = used = 0
    for req, (seq_len, query_len) in enumerate(zip(lens, new, strict=True)):
        context = seq_len - query_len
        for column in range(table.shape[1]):
            is_first = column < num_first
            position = column if is_first else context - num_recent + column - num_first
            if not (0 if is_first else num_first) <= position < context:
                continue
            if torch.rand(1, generator=generator) < share:
                row = int(order[used])
                table[req, column] = row
                key[row], value[row] = paged.key[begin + position], paged.value[begin + position]
                used += 1
        begin += seq_len
    return Copies(key, value, num_first), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 20, "soft_cap": 5.0}, {"window": 70}, {"sinks": True}, {"chunk": 50}],
    ids=str,
)
def test_equals_the_oracle(options: dict, share: float, dtype: torch.dtype) -> None:
    lens, new = [100, 640, 5, 3, 70, 33], [60, 2, 5, 1, 1, 1]
    paged = make_paged(codec_of("fibquant_2bit", 64), lens, new, group_size=3, dtype=dtype)
    copies = make_copies(paged, 4, 48, torch.bfloat16, share)
    check_against_oracle(paged, copies=copies, **paged.raw, **paged.given(options))


@pytest.mark.parametrize(("num_first", "num_recent"), [(0, 1), (1, 0), (4, 0), (0, 64), (40, 100)])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_sizes(num_first: int, num_recent: int, head_dim: int) -> None:
    paged = make_paged(codec_of("fibquant_3bit", head_dim), [130, 64, 1, 90], [1, 3, 1, 90])
    copies = make_copies(paged, num_first, num_recent, torch.float16)
    check_against_oracle(paged, copies=copies, **paged.raw)


def test_copies_of_everything_leave_no_trace_of_codes() -> None:
    """With copies of all cached tokens the pages are not read, and the answer is the truth."""
    paged = make_paged(codec_of("fibquant_1bit", 64), [70, 40], [1, 7], group_size=4)
    copies = make_copies(paged, 4, 70, torch.float32)
    before = paged.attend(copies=copies, **paged.raw)
    paged.cache.fill_(0xFF)
    assert torch.equal(before, paged.attend(copies=copies, **paged.raw))
    assert not torch.isnan(before).any()


def test_one_missing_copy_is_read_from_its_code() -> None:
    paged = make_paged(codec_of("fibquant_1bit", 64), [70], [1])
    copies = make_copies(paged, 4, 32, torch.float32)
    whole = paged.attend(copies=copies, **paged.raw)
    copies[1][0, 10] = -1
    assert not torch.allclose(whole, paged.attend(copies=copies, **paged.raw), atol=1e-4)
    check_against_oracle(paged, copies=copies, **paged.raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_tokens_are_copied_after_everything_is_attended(dtype: torch.dtype) -> None:
    """A row that changes hands in a step is read for its old owner; the oracle is attended last."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [100, 40], [3, 1], group_size=3, dtype=dtype)
    copies = make_copies(paged, 4, 32, torch.bfloat16 if dtype == torch.float32 else dtype)
    copies, table = copies
    free = sorted(set(range(len(copies.key))) - set(table.flatten().tolist()))
    new_tokens = torch.tensor([1, 3, 2])
    new_rows = torch.tensor([int(table[0, -1]), free[0], int(table[1, 0])])
    raw_key, raw_value = (x.clone() for x in paged.raw.values())
    raw_key[3, 1, 5] = torch.nan
    raw_value[3, 0, 7] = torch.inf
    raw = {"raw_key": raw_key, "raw_value": raw_value}
    found = []
    for reference in (False, True):
        mine = copies._replace(key=copies.key.clone(), value=copies.value.clone())
        with use_reference() if reference else contextlib.nullcontext():
            out = paged.attend(copies=(mine, table, new_tokens, new_rows), **raw)
        found.append((out, mine))
    (out, mine), (expected, theirs) = found
    torch.testing.assert_close(out[:3], expected[:3], atol=2e-2, rtol=2e-2)
    for name, raw_vectors in (("key", raw_key), ("value", raw_value)):
        stored = getattr(mine, name)
        assert torch.equal(stored.isnan(), getattr(theirs, name).isnan())
        assert torch.equal(stored.nan_to_num(), getattr(theirs, name).nan_to_num())
        for token, row in zip(new_tokens.tolist(), new_rows.tolist(), strict=True):
            finite = torch.isfinite(raw_vectors[token]).all(-1, keepdim=True)
            exact = torch.where(finite, raw_vectors[token], 0).to(stored.dtype)
            assert torch.equal(stored[row], exact)


@pytest.mark.parametrize(
    ("tokens", "rows", "message"),
    [
        ([1], [0], "new_tokens and new_rows must be tokens of the batch"),
        ([0], [5], "new_tokens and new_rows must be tokens of the batch"),
        ([-1], [0], "new_tokens and new_rows must be tokens of the batch"),
        ([0], [0, 1], r"new_rows must be torch.int64 \[1\]"),
        ([0], None, "new_rows must be .* got None"),
        ([0.0], [0], "new_tokens must be torch.int64"),
    ],
)
def test_bad_new_copies_are_refused(tokens: list, rows: list | None, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [20], [1])
    vectors = torch.zeros(5, 2, 64)
    table = torch.full((1, 8), -1, dtype=torch.int32)
    new = torch.tensor(tokens), None if rows is None else torch.tensor(rows)
    with pytest.raises(ValueError, match=message):
        paged.attend(copies=(Copies(vectors, vectors.clone(), 4), table, *new), **paged.raw)
    assert not vectors.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(3, 4, dtype=torch.int32)}, "copy_table must be"),
        ({"table": torch.zeros(1, 4, dtype=torch.int64)}, "copy_table must be torch.int32"),
        ({"num_first": 9}, "num_first 9"),
        ({"key": torch.zeros(5, 3, 64)}, "copies.key must be"),
        ({"value": torch.zeros(5, 64, 2).transpose(1, 2)}, "copies.value must be"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_copies_are_refused(change: dict, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [20], [1])
    vectors = torch.zeros(5, 2, 64)
    fields = {"key": vectors, "value": vectors, "num_first": 4} | change
    fields.setdefault("table", torch.full((1, 8), -1, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        table = fields.pop("table")
        paged.attend(copies=(Copies(**fields), table), **paged.raw)


def test_copies_need_raw_tokens() -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [20], [1])
    copies = make_copies(paged, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="raw_key"):
        paged.attend(copies=copies)
