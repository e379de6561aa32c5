# SPDX-License-Identifier: Apache-2.0
"""The pool of copies of a GPU: it follows its rule to the letter, what is found is always what was
last written, and full batches find most of what they look for. It runs here in the emulator."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulated as emu
from vllm_fibquant.engine import device_pool
from vllm_fibquant.engine.device_pool import DevicePool

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

NEEDS_ENGINE = False
BLOCK = 16


class PlainPool:
    """The rule in plain Python, one token after the other."""

    def __init__(self, num_rows: int, num_first: int, num_recent: int) -> None:
        self.num_first, self.num_recent = num_first, num_recent
        share = 4 * num_first + 2 * num_recent
        self.first_units = num_rows * 4 * num_first // share // num_first if num_first else 0
        self.recent_units = (num_rows - self.first_units * num_first) // 16
        self.slot_of_row: dict[int, int] = {}

    def row(self, slot: int, is_first: bool) -> int | None:
        units = self.first_units if is_first else self.recent_units
        if not units:
            return None
        unit = (slot // 16 * 2654435769 % 2**32) * units // 2**32
        if is_first:
            return unit * self.num_first + slot % 16
        return self.first_units * self.num_first + unit * 16 + slot % 16

    def is_near(self, position: int, seq_len: int) -> bool:
        return position < self.num_first or position >= seq_len - self.num_recent

    def step(self, requests, block_size: int) -> tuple[list[list[int]], list[int]]:
        """Each request is (blocks, context_len, query_len)."""
        at = lambda blocks, p: blocks[p // block_size] * block_size + p % block_size  # noqa: E731
        new = [(at(b, p), p, c + q) for b, c, q in requests for p in range(c, c + q)]
        written = {slot for slot, *_ in new}
        kept = {row: slot for row, slot in self.slot_of_row.items() if slot not in written}
        self.slot_of_row = kept
        wanted = [
            self.row(s, p < self.num_first) if self.is_near(p, n) else None for s, p, n in new
        ]
        for (slot, *_), row in zip(new, wanted, strict=True):
            if row is not None:
                self.slot_of_row[row] = slot  # the last of several stays
        rows = [
            -1 if row is None or self.slot_of_row[row] != slot else row
            for (slot, *_), row in zip(new, wanted, strict=True)
        ]
        table = []
        for blocks, context, _ in requests:
            line = [(p, True) for p in range(self.num_first)]
            line += [(p, False) for p in range(context - self.num_recent, context)]
            found = []
            for p, is_first in line:
                row = None
                if (0 if is_first else self.num_first) <= p < context:
                    slot = at(blocks, p)
                    row = self.row(slot, is_first)
                    row = row if self.slot_of_row.get(row, -1) == slot else None
                found.append(-1 if row is None else row)
            table.append(found)
        return table, rows


def pool_of(num_rows: int, num_first: int, num_recent: int, block: int, *most: int) -> DevicePool:
    """A pool that is planned by the CUDA kernels in their emulator."""
    shape = num_rows, num_first, num_recent, block, *most
    return DevicePool(*shape, torch.device("cpu"), emu.emulated().plan_copies)


class Run:
    """Requests that write numbered tokens through a pool, as an engine does on a GPU."""

    def __init__(self, num_rows: int, num_first: int, num_recent: int, block: int = BLOCK) -> None:
        self.pool = pool_of(num_rows, num_first, num_recent, block, 64, 4096)
        self.plain = PlainPool(num_rows, num_first, num_recent)
        self.block, self.serial = block, 0
        self.buffer = np.full(num_rows, -1)  # the copies: a token's serial number
        self.slots: dict[int, int] = {}  # the codes: slot -> serial number

    def step(self, requests: list[tuple[list[int], int, int]]) -> list[list[int]]:
        """Each request is (blocks, context_len, query_len). Returns the positions it found."""
        loc = torch.tensor([0, *(q for _, _, q in requests)]).cumsum(0).int()
        lens = torch.tensor([c + q for _, c, q in requests], dtype=torch.int32)
        width = max(len(blocks) for blocks, _, _ in requests)
        # Entries behind a request's blocks are left from others.
        table = torch.tensor(
            [b + [2**30] * (width - len(b)) for b, _, _ in requests], dtype=torch.int32
        )
        slots = [
            b[p // self.block] * self.block + p % self.block
            for b, c, q in requests
            for p in range(c, c + q)
        ]
        slot_mapping = torch.tensor(slots, dtype=torch.int64)
        plan = self.pool.step(loc, lens, table, slot_mapping)
        rows = plan.rows[: len(slots)].tolist()
        assert (plan.table.tolist(), rows) == self.plain.step(requests, self.block)
        taken = [row for row in rows if row >= 0]
        assert len(set(taken)) == len(taken), "two tokens in one row"
        # Layers encode before they attend: codes and copies of new tokens are there.
        for slot, row in zip(slots, rows, strict=True):
            self.slots[slot] = self.serial
            if row >= 0:
                self.buffer[row] = self.serial
            self.serial += 1
        found: list[list[int]] = []
        first, recent = self.pool.num_first, self.pool.num_recent
        for (blocks, context, _), line in zip(requests, plan.table.tolist(), strict=True):
            found.append([])
            for column, row in enumerate(line):
                position = column if column < first else context - recent + column - first
                if row < 0:
                    continue
                assert 0 <= position < context, "a copy of a token that is not cached"
                slot = blocks[position // self.block] * self.block + position % self.block
                assert self.buffer[row] == self.slots[slot], "a copy of something else"
                found[-1].append(position)
        return found


def test_the_newest_and_the_first_tokens_are_found() -> None:
    run = Run(num_rows=200, num_first=2, num_recent=20)
    blocks = list(range(1, 6))
    assert run.step([(blocks, 0, 11)]) == [[]]
    for context in range(11, 60):
        expected = sorted({0, 1, *range(max(0, context - 20), context)})
        assert run.step([(blocks, context, 1)]) == [expected]


def test_of_a_long_chunk_the_near_tokens_take_rows_alone() -> None:
    run = Run(num_rows=200, num_first=2, num_recent=20)
    run.step([([9], 0, 16)])
    used = run.pool.num_used
    assert used == 16
    run.step([(list(range(1, 9)), 0, 128)])
    assert run.pool.num_used <= used + 22


def test_a_written_slot_loses_its_old_copy() -> None:
    run = Run(num_rows=400, num_first=0, num_recent=16)
    run.step([([5], 0, 16)])
    run.step([([5, 6, 7], 0, 40)])  # block 5 is written again by tokens that are not recent
    assert run.step([([5, 8], 16, 1)]) == [[]]


def test_first_tokens_outlive_other_requests_windows() -> None:
    run = Run(num_rows=64, num_first=4, num_recent=16)
    run.step([([1], 0, 8)])
    for block in range(2, 60):
        run.step([([900 + block], 0, 0), ([block, block + 100], 4, 20)])
    assert run.step([([1], 8, 1)])[0][:4] == [0, 1, 2, 3]


def test_a_block_shared_while_it_is_written_is_found_by_both() -> None:
    """Unlike on CPUs: all layers encode before they attend."""
    run = Run(num_rows=400, num_first=0, num_recent=4)
    found = run.step([([5, 6], 0, 17), ([5, 7], 16, 1)])
    assert found[1] == [13, 14, 15]  # position 12 was not near


def test_skipped_slots_and_padding_are_not_copied() -> None:
    pool = pool_of(64, 0, 4, BLOCK, 4, 8)
    loc = torch.tensor([0, 3, 3], dtype=torch.int32)
    lens = torch.tensor([3, 0], dtype=torch.int32)  # the second request is padding
    slots = torch.tensor([-1, 17, -1, -1, -1])
    plan = pool.step(loc, lens, torch.zeros(2, 1, dtype=torch.int32), slots)
    assert pool.num_used == 1 and (plan.rows[:5] >= 0).tolist() == [False, True, *[False] * 3]
    assert (plan.table == -1).all()


def test_what_a_plan_is_made_of_stays_in_place() -> None:
    """Captured CUDA graphs read it there."""
    run = Run(num_rows=64, num_first=1, num_recent=4)
    places = set()
    for context in (0, 3):
        run.step([([1], context, 2)])
        places.add((run.pool._table.data_ptr(), run.pool._rows.data_ptr()))
    assert len(places) == 1


def test_more_than_the_pool_was_made_for_is_refused() -> None:
    pool = pool_of(64, 0, 4, BLOCK, 1, 2)
    loc, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 1 requests and 2 new tokens, got 1 and 3"):
        pool.step(loc, lens, torch.zeros(1, 1, dtype=torch.int32), torch.arange(3))
    with pytest.raises(ValueError, match="num_first must be at most 16"):
        pool_of(64, 17, 4, BLOCK, 1, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 3),
    st.integers(0, 20),
    st.sampled_from([16, 48]),
    st.randoms(use_true_random=False),
)
def test_copies_never_lie(num_rows, num_first, num_recent, block, random) -> None:
    """Blocks change hands at random, chunks have any length: what is found is right."""
    if num_first + num_recent == 0:
        return
    run = Run(num_rows, num_first, num_recent, block)
    live: list[tuple[list[int], int]] = []
    for _ in range(20):
        free = [b for b in range(1, 40) if not any(b in blocks for blocks, _ in live)]
        if len(free) >= 4 and random.random() < 0.5:
            live.append((random.sample(free, 4), 0))
        batch = []
        for i, (blocks, context) in enumerate(live):
            query_len = random.choice([0, 1, 1, 1, random.randint(0, 40)])
            query_len = min(query_len, len(blocks) * block - context)
            batch.append((blocks, context, query_len))
            live[i] = (blocks, context + query_len)
        if batch:
            run.step(batch)
        live = [(b, c) for b, c in live if c < len(b) * block and random.random() < 0.9]


@pytest.mark.parametrize("shuffled", [False, True], ids=["a fresh server's blocks", "any blocks"])
def test_full_batches_find_most_of_their_windows(shuffled: bool) -> None:
    """32 requests of 128 newest and 4 first tokens, as long as their windows and longer."""
    num_reqs, num_new = 32, 200
    num_rows = num_reqs * device_pool.rows_of_a_request("cuda", 4, 128)
    pool = pool_of(num_rows, 4, 128, BLOCK, num_reqs, 4096)
    blocks = list(range(1, num_reqs * 32 + 1))
    if shuffled:
        random.Random(1).shuffle(blocks)
    table = torch.tensor(blocks, dtype=torch.int32).view(num_reqs, 32)
    lens = torch.full((num_reqs,), 150, dtype=torch.int32)
    loc = torch.arange(num_reqs + 1, dtype=torch.int32)
    position = torch.arange(150).repeat(num_reqs)
    req = torch.arange(num_reqs).repeat_interleave(150)
    slots = table[req, position // BLOCK].long() * BLOCK + position % BLOCK
    for begin in range(0, num_reqs, 16):  # prompts
        own = slice(begin * 150, (begin + 16) * 150)
        pool.step(loc[:17] * 150, lens[:16], table[begin : begin + 16], slots[own])
    for _ in range(num_new):
        lens += 1
        at = (lens - 1).long()
        slot = table.gather(1, (at // BLOCK)[:, None])[:, 0].long() * BLOCK + at % BLOCK
        plan = pool.step(loc, lens, table, slot)
    found = (plan.table >= 0).float()
    assert found[:, 4:].mean() >= 0.7, float(found[:, 4:].mean())
    assert found[:, :4].mean() >= 0.8, float(found[:, :4].mean())
