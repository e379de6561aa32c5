# SPDX-License-Identifier: Apache-2.0
"""Which tokens also have a copy in 16 bits, and in which row of the layers' buffers.

Attention depends most on a request's newest tokens and on its first ones. Their codes are written
like everybody's, so pages stay complete, shareable and movable; beside them a small pool of rows
holds exact copies, found by physical slot. A copy that is missing costs quality, never correctness:
its token is read from its code.

A slot's copy is dropped whenever the slot is written again, so a copy always holds what its slot's
code encodes. When the pool is full, the rows whose copies have been read least recently are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NEVER = -1


MAX_COPY_SHARE = 0.1
"""Most of the memory for pages that copies of tokens may take."""


def num_copy_rows(wanted: int, row_bytes: int, available_bytes: int) -> int:
    """How many tokens are copied at most.

    Args:
        wanted: as many as full batches have.
        row_bytes: of one token's copy in all layers.
        available_bytes: what copies and pages may take together.
    """
    return max(1, min(wanted, int(available_bytes * MAX_COPY_SHARE) // row_bytes))


@dataclass(frozen=True)
class CopyPlan:
    """What one step reads from copies and what it copies.

    Attributes:
        table: int32 [num_reqs, num_first + num_recent], as `ops.Batch.copy_table`.
        tokens: int64 [n], new tokens of this step to be copied once attention has been computed.
        rows: int64 [n], where to; distinct.
    """

    table: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class CopyPool:
    """The rows of one group of layers, which share block tables and so slots.

    Args:
        num_rows: rows of each layer's buffer, at least 1.
        num_first: first tokens of a request to be copied.
        num_recent: newest tokens of a request to be copied.
        block_size: tokens of a block.
    """

    def __init__(self, num_rows: int, num_first: int, num_recent: int, block_size: int) -> None:
        self.num_rows = num_rows
        self.num_first = num_first
        self.num_recent = num_recent
        self.block_size = block_size
        self._row_of_slot = np.full(0, -1, np.int64)  # grows to the highest slot seen
        self._slot_of_row = np.full(num_rows, -1, np.int64)
        self._last_read = np.full(num_rows, _NEVER, np.int64)
        self._now = 0

    @property
    def num_used(self) -> int:
        """Rows that hold a copy."""
        return int((self._slot_of_row >= 0).sum())

    def step(
        self,
        query_start_loc: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        slot_mapping: npt.NDArray[np.int64],
    ) -> CopyPlan:
        """Plans one step; what it returns must be carried out.

        Args:
            query_start_loc: [num_reqs + 1].
            seq_lens: [num_reqs], new tokens included.
            block_table: [num_reqs, max_blocks].
            slot_mapping: [num_tokens] of the new tokens; -1 is copied nowhere.
        """
        self._now += 1
        query_lens = np.diff(query_start_loc).astype(np.int64)
        context = seq_lens - query_lens
        begin = query_start_loc[0]
        index = np.arange(query_start_loc[-1] - begin)
        slots = slot_mapping[begin : begin + len(index)]
        written = slots >= 0
        self._reach(int(slots.max(initial=-1)))
        # First of all: a request may share, in this very step, a block that another one writes.
        self._drop(slots[written])

        table = self._lookup(context, block_table)
        # Rows that the next step will read again are the last to be taken.
        staying = table.copy()
        columns = np.arange(self.num_recent)
        staying[:, self.num_first :][columns < query_lens[:, None]] = -1
        self._last_read[staying[staying >= 0]] = self._now

        req = np.repeat(np.arange(len(query_lens)), query_lens)
        position = context[req] + index - (query_start_loc[:-1] - begin)[req]
        wanted = (position < self.num_first) | (position >= seq_lens[req] - self.num_recent)
        # More new tokens than rows: the last ones are copied.
        chosen = np.flatnonzero(written & wanted)[-self.num_rows :]
        return CopyPlan(table.astype(np.int32), chosen + begin, self._assign(slots[chosen]))

    def _lookup(
        self, context: npt.NDArray[np.int64], block_table: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Rows of the cached tokens a step reads, -1 for none."""
        first = np.broadcast_to(np.arange(self.num_first), (len(context), self.num_first))
        recent = context[:, None] - self.num_recent + np.arange(self.num_recent)
        positions = np.concatenate((first, recent), axis=1)
        # A recent token that is also a first one counts once.
        exists = positions < context[:, None]
        exists[:, self.num_first :] &= recent >= self.num_first
        positions = np.where(exists, positions, 0)
        blocks = np.take_along_axis(block_table, positions // self.block_size, axis=1)
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        known = exists & (slots < len(self._row_of_slot)) & (slots >= 0)
        rows = np.full(positions.shape, -1, np.int64)
        rows[known] = self._row_of_slot[slots[known]]
        return rows

    def _reach(self, slot: int) -> None:
        """Makes room for `slot` in the map."""
        size = len(self._row_of_slot)
        if slot >= size:
            grown = np.full(max(slot + 1, 2 * size), -1, np.int64)
            grown[:size] = self._row_of_slot
            self._row_of_slot = grown

    def _drop(self, slots: npt.NDArray[np.int64]) -> None:
        """Forgets the copies of slots."""
        rows = self._row_of_slot[slots]
        rows = rows[rows >= 0]
        self._slot_of_row[rows] = -1
        self._last_read[rows] = _NEVER
        self._row_of_slot[slots] = -1

    def _assign(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows for at most num_rows slots without one: those least recently read."""
        if len(slots) == 0:
            return np.empty(0, np.int64)
        rows = np.argpartition(self._last_read, len(slots) - 1)[: len(slots)]
        previous = self._slot_of_row[rows]
        self._row_of_slot[previous[previous >= 0]] = -1
        self._slot_of_row[rows] = slots
        self._row_of_slot[slots] = rows
        self._last_read[rows] = self._now
        return rows
