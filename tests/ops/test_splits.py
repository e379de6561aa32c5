# SPDX-License-Identifier: Apache-2.0
"""Splits fill a GPU: a replay of the grid, wave by wave, beside the best number of splits."""

from __future__ import annotations

import math

import pytest

from vllm_fibquant.ops import splits
from vllm_fibquant.ops.cuda import MIN_SPLIT, NARROW_COLUMNS

MAX_TOKENS = 131072
BATCHES = (1, 2, 4, 8, 16, 24, 32, 34, 40, 48, 64, 128)
SHAPES = ((8, 8), (1, 8), (2, 8), (8, 4), (4, 7), (8, 1))
"""KV heads of a rank, query heads per KV head."""


def busy_row_blocks(num_reqs: int, query_len: int, group_size: int, columns: int) -> int:
    """Row blocks of the grid that have rows, as RowBlock::find of csrc/cuda/attend.h finds them."""
    starts = [i * query_len for i in range(num_reqs + 1)]
    begins = [starts[r] * group_size // columns + r for r in range(num_reqs)]
    busy = 0
    for block in range(starts[-1] * group_size // columns + num_reqs):
        req = max(r for r in range(num_reqs) if begins[r] <= block)
        first_row = (block - begins[req]) * columns
        busy += query_len * group_size - first_row > 0
    return busy


def time_of(num_ctas: int, num_splits: int, slots: int, context: int) -> float:
    """In tiles of 16 tokens: all waves of CTAs, each as long as a split."""
    per_split = math.ceil(math.ceil(context / 16) / num_splits)
    used = math.ceil(math.ceil(context / 16) / per_split)
    return math.ceil(num_ctas * used / slots) * per_split


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(("num_sms", "per_sm"), [(132, 2), (132, 1), (108, 1), (128, 1)])
@pytest.mark.parametrize(("num_kv_heads", "group_size"), SHAPES)
def test_splits_fill_the_gpu(num_kv_heads, group_size, num_sms, per_sm, query_len) -> None:
    slots = num_sms * per_sm
    for batch in BATCHES:
        blocks = busy_row_blocks(batch, query_len, group_size, NARROW_COLUMNS)
        found = splits.num_row_blocks(batch, batch * query_len, group_size, NARROW_COLUMNS)
        assert found == blocks
        num_ctas = blocks * num_kv_heads
        chosen = splits.choose_splits(num_ctas, MAX_TOKENS, slots, MIN_SPLIT)
        for context in (32768, MAX_TOKENS):
            best = min(
                time_of(num_ctas, n, slots, context) for n in range(1, context // MIN_SPLIT + 1)
            )
            share = best / time_of(num_ctas, chosen, slots, context)
            assert share >= 0.9, (batch, chosen, context, share)


def test_requests_of_different_lengths() -> None:
    assert splits.num_row_blocks(3, 8, 4, 8) == 4  # 32 rows, of which no request has fewer than 1
    assert splits.num_row_blocks(7, 8, 1, 8) == 7


def test_short_sequences_are_not_cut() -> None:
    assert splits.choose_splits(8, 512, 264, MIN_SPLIT) == 1
    assert splits.choose_splits(10000, MAX_TOKENS, 264, MIN_SPLIT) <= 2
