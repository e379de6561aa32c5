# SPDX-License-Identifier: Apache-2.0
"""Which tokens also have a copy in 16 bits, and in which row of the layers' buffers.

Attention depends most on a request's newest tokens and on its first ones. Their codes are written
like everybody's, so pages stay complete, shareable and movable; beside them a small pool of rows
holds exact copies, found by physical slot. A copy that is missing costs quality, never correctness:
its token is read from its code.

A slot's copy is dropped whenever the slot is written again, so a copy always holds what its slot's
code encodes. When the pool is full, the rows whose copies have been read least recently are taken.

Steps are planned by the CPU library (csrc/cpu/copy_pool.h), in about 10 us: some forty calls of
numpy take 200 in a running engine.
"""

from __future__ import annotations

import functools
from ctypes import byref
from typing import NamedTuple

import torch

from vllm_fibquant.ops.checks import at_least, check_tensor
from vllm_fibquant.ops.cpu_library import FqBatch, FqCopyPool, library

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


class CopyPlan(NamedTuple):
    """What one step reads from copies and what it copies.

    Attributes:
        table: int32 [num_reqs, num_first + num_recent], as `ops.Batch.copy_table`.
        rows: where to. On a CPU int64 [n], distinct. On a GPU int32 [at least the number of new
            tokens], as `ops.Copied.rows`; behind the new tokens are rows of other steps.
        tokens: int64 [n], new tokens of this step to be copied once attention has been computed;
            None on a GPU, where encode copies.
    """

    table: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor | None = None


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
        self._row_of_slot = torch.empty(0, dtype=torch.int32)  # grows to the highest slot seen
        self._slot_of_row = torch.full((num_rows,), -1, dtype=torch.int64)
        row = torch.arange(num_rows + 1, dtype=torch.int32)
        self._next, self._previous = row.roll(-1), row.roll(1)
        self._struct = FqCopyPool(
            slot_of_row=self._slot_of_row.data_ptr(),
            next=self._next.data_ptr(),
            previous=self._previous.data_ptr(),
            num_rows=num_rows,
            num_first=num_first,
            num_recent=num_recent,
            block_size=block_size,
        )
        self._batch = FqBatch()

    @property
    def num_used(self) -> int:
        """Rows that hold a copy."""
        return int((self._slot_of_row >= 0).sum())

    def step(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> CopyPlan:
        """Plans one step; what it returns must be carried out.

        Args:
            query_start_loc: int32 [num_reqs + 1].
            seq_lens: int32 [num_reqs], new tokens included.
            block_table: int32 [num_reqs, max_blocks], last axis contiguous.
            slot_mapping: int64 of the new tokens; -1 is copied nowhere.

        Raises:
            ValueError: dtype or layout of a tensor, or fewer slots than new tokens.
        """
        check = functools.partial(check_tensor, "CopyPool.step", device=seq_lens.device)
        check("seq_lens", seq_lens, ("num_reqs",), torch.int32)
        num_reqs = seq_lens.shape[0]
        check("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
        check("block_table", block_table, (at_least(num_reqs), "max_blocks"), torch.int32)
        check("slot_mapping", slot_mapping, (at_least(int(query_start_loc[-1])),), torch.int64)
        batch = self._batch
        batch.query_start_loc, batch.seq_lens = query_start_loc.data_ptr(), seq_lens.data_ptr()
        batch.block_table, batch.num_reqs = block_table.data_ptr(), num_reqs
        batch.stride_block_table = block_table.stride(0)
        table = torch.empty(num_reqs, self.num_first + self.num_recent, dtype=torch.int32)
        most = min(self.num_rows, slot_mapping.shape[0])
        tokens, rows = torch.empty(2, most, dtype=torch.int64)
        out = slot_mapping.data_ptr(), table.data_ptr(), tokens.data_ptr(), rows.data_ptr()
        structs, plan_copies = (byref(self._struct), byref(batch)), library().fq_plan_copies
        if (num_new := plan_copies(*structs, *out)) < 0:
            self._reach(-num_new)
            num_new = plan_copies(*structs, *out)
        return CopyPlan(table, rows[:num_new], tokens[:num_new])

    def _reach(self, num_slots: int) -> None:
        """Makes room for slots below `num_slots` in the map."""
        size = len(self._row_of_slot)
        grown = torch.full((max(num_slots, 2 * size),), -1, dtype=torch.int32)
        grown[:size] = self._row_of_slot
        self._row_of_slot = grown
        self._struct.row_of_slot, self._struct.num_slots = grown.data_ptr(), len(grown)
