# SPDX-License-Identifier: Apache-2.0
"""The pool of copies: what is found is always what was last written, and what matters is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fibquant.engine.copies import CopyPool

NEEDS_ENGINE = False

BLOCK = 4


class Run:
    """Requests that write numbered tokens through a pool, as an engine would."""

    def __init__(self, num_rows: int, num_first: int, num_recent: int) -> None:
        self.pool = CopyPool(num_rows, num_first, num_recent, BLOCK)
        self.buffer = np.full(num_rows, -1)  # the copies: a token's serial number
        self.slots: dict[int, int] = {}  # the codes: slot -> serial number
        self.serial = 0

    def step(self, requests: list[tuple[list[int], int, int]]) -> list[list[int | None]]:
        """Each request is (blocks, context_len, query_len). Returns what its copies hold."""
        query_lens = [q for _, _, q in requests]
        loc = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        seq_lens = np.array([c + q for _, c, q in requests], np.int32)
        width = max(len(blocks) for blocks, _, _ in requests)
        table = np.array([b + [0] * (width - len(b)) for b, _, _ in requests], np.int32)
        slots = np.array(
            [b[p // BLOCK] * BLOCK + p % BLOCK for b, c, q in requests for p in range(c, c + q)],
            np.int64,
        )
        plan = self.pool.step(*map(torch.from_numpy, (loc, seq_lens, table, slots)))
        plan_rows, plan_tokens = plan.rows.numpy(), plan.tokens.numpy()
        assert len(set(plan_rows)) == len(plan_rows), "two tokens in one row"
        found: list[list[int | None]] = []
        for (blocks, context, _), rows in zip(requests, plan.table.tolist(), strict=True):
            found.append([])
            for column, row in enumerate(rows):
                first, recent = self.pool.num_first, self.pool.num_recent
                position = column if column < first else context - recent + column - first
                if row < 0:
                    found[-1].append(None)
                    continue
                assert 0 <= position < context, "a copy of a token that is not cached"
                slot = blocks[position // BLOCK] * BLOCK + position % BLOCK
                assert self.buffer[row] == self.slots[slot], "a copy of something else"
                found[-1].append(position)
        serials = np.arange(self.serial, self.serial + len(slots))
        self.serial += len(slots)
        self.slots.update(zip(slots.tolist(), serials.tolist(), strict=True))
        self.buffer[plan_rows] = serials[plan_tokens]
        return found


def test_the_newest_and_the_first_tokens_are_found() -> None:
    run = Run(num_rows=6, num_first=2, num_recent=4)
    blocks = list(range(10))
    assert run.step([(blocks, 0, 11)]) == [[None] * 6]
    for context in range(11, 40):
        expected = [0, 1, *range(context - 4, context)]
        assert run.step([(blocks, context, 1)]) == [expected]


def test_a_token_that_is_first_and_recent_counts_once() -> None:
    run = Run(num_rows=8, num_first=2, num_recent=4)
    run.step([([0], 0, 3)])
    assert run.step([([0], 3, 1)]) == [[0, 1, None, None, None, 2]]


def test_a_written_slot_loses_its_old_copy() -> None:
    """A block that changes hands within a long chunk must not keep the last owner's copies."""
    run = Run(num_rows=8, num_first=0, num_recent=2)
    run.step([([5], 0, 4)])
    run.step([([5, 6, 7], 0, 9)])  # block 5 is written again by tokens that are not recent
    assert run.step([([5, 8], 4, 1)]) == [[None, None]]


def test_a_block_shared_while_it_is_written_shows_nobody_what_it_held() -> None:
    run = Run(num_rows=8, num_first=0, num_recent=4)
    run.step([([5], 0, 4)])
    found = run.step([([5, 6], 0, 5), ([5, 7], 4, 1)])  # the second found block 5 in the cache
    assert found[1] == [None] * 4


def test_a_shared_prefix_is_found_by_both() -> None:
    run = Run(num_rows=16, num_first=1, num_recent=2)
    run.step([([0, 1], 0, 4)])
    assert run.step([([0, 2], 4, 1), ([0, 3], 4, 1)]) == [[0, 2, 3], [0, 2, 3]]


def test_an_idle_request_loses_its_copies_first() -> None:
    run = Run(num_rows=8, num_first=0, num_recent=4)
    run.step([([0, 1], 0, 4), ([2, 3, 4], 0, 4)])
    for context in range(4, 8):
        assert run.step([([2, 3, 4], context, 1)])[0] == list(range(context - 4, context))
    assert run.step([([0, 1], 4, 1), ([2, 3, 4], 8, 1)]) == [[None] * 4, [4, 5, 6, 7]]


def test_rejected_drafts_are_overwritten() -> None:
    run = Run(num_rows=8, num_first=0, num_recent=4)
    run.step([([0, 1], 0, 4)])
    run.step([([0, 1], 4, 3)])  # two drafts beyond the accepted token
    assert run.step([([0, 1], 5, 3)]) == [[1, 2, 3, 4]]
    assert run.step([([0, 1], 8, 0)]) == [[4, 5, 6, 7]]


def test_skipped_slots_are_not_copied() -> None:
    pool = CopyPool(4, 0, 4, BLOCK)
    loc, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    plan = pool.step(loc, lens, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-1, 1, -1]))
    assert plan.tokens.tolist() == [1] and pool.num_used == 1


def test_tensors_that_the_library_would_misread_are_refused() -> None:
    pool = CopyPool(4, 0, 4, BLOCK)
    loc, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    table, slots = torch.zeros(1, 1, dtype=torch.int32), torch.arange(3)
    with pytest.raises(ValueError, match="slot_mapping must be torch.int64"):
        pool.step(loc, lens, table, slots.int())
    with pytest.raises(
        ValueError, match=r"slot_mapping must be .*at least 3.* got torch.int64 \[2\]"
    ):
        pool.step(loc, lens, table, slots[:2])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 6), st.randoms(use_true_random=False))
def test_copies_never_lie(num_rows: int, num_first: int, num_recent: int, random) -> None:
    """Blocks change hands at random, chunks have any length: what is found is right."""
    run = Run(num_rows, num_first, num_recent)
    live: list[tuple[list[int], int]] = []
    for _ in range(25):
        free = [b for b in range(30) if not any(b in blocks for blocks, _ in live)]
        if len(free) >= 5 and random.random() < 0.5:
            live.append((random.sample(free, 5), 0))
        batch = []
        for i, (blocks, context) in enumerate(live):
            query_len = random.randint(0, min(6, len(blocks) * BLOCK - context))
            batch.append((blocks, context, query_len))
            live[i] = (blocks, context + query_len)
        if batch:
            run.step(batch)
        live = [(b, c) for b, c in live if c < len(b) * BLOCK and random.random() < 0.9]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_pool_smaller_than_a_step(num_rows: int) -> None:
    run = Run(num_rows, num_first=0, num_recent=4)
    run.step([([0, 1], 0, 4), ([2, 3], 0, 4)])
    found = run.step([([0, 1], 4, 1), ([2, 3], 4, 1)])
    assert sum(p is not None for positions in found for p in positions) == num_rows
