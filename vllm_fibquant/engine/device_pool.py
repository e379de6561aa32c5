# SPDX-License-Identifier: Apache-2.0
"""Which tokens have a copy in 16 bits where the host may not look: the pool of copies of a GPU.

`copies.CopyPool` keeps the least recently read rows for others, a decision for a host that has the
batch before it. Here a token's row follows from its slot alone, and a tag says whose copy a row
holds. All is done on the device, once a step for all layers of a group, before the first of them
encodes: nothing is read back, and captured CUDA graphs find the plan where it was (`table`,
`rows`). Kernels of the CUDA library do it (csrc/cuda/copy_plan.h); their oracle, the rule in plain
Python, is in tests/engine/test_device_pool.py.

Rules of a step, in this order:

1. A slot that is written loses its copy.
2. A new token that is near (among its request's first or newest ones) takes the row of its slot,
   whosever it was. Of several that would take one row the last of the batch gets it.
3. The table names the copies that attention reads: those whose tags are the slots of the request's
   first tokens and of the last ones before its new tokens.

Layers copy what took a row while they encode, which is before they attend. So a tag always names
the vectors that its slot's code encodes, and a copy that was lost costs quality alone: its token is
read from its code. First tokens have rows of their own, which only other requests' first tokens
take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vllm_fibquant.engine.copies import CopyPlan
from vllm_fibquant.ops import cuda
from vllm_fibquant.ops.checks import at_least, check_tensor
from vllm_fibquant.ops.cuda_tables import FqCudaPlan

UNIT = 16
"""Slots that keep together: blocks have a multiple of it."""
RECENT_ROWS, FIRST_ROWS = 2, 4
"""Rows for each token that full batches would copy: rows are taken as if at random, and with as
many rows as tokens a third of them would be lost. First tokens are never written again."""


def serves(device_type: str) -> bool:
    """Whether copies are planned by this pool on such a device, and written by encode."""
    return device_type == "cuda"


Planner = Callable[[FqCudaPlan, torch.device], None]
"""Carries out a step's plan: `cuda.Library.plan_copies`."""


def planner() -> Planner:
    """The kernels that plan on GPUs."""
    return cuda.library().plan_copies


def rows_of_a_request(device_type: str, num_first: int, num_recent: int) -> int:
    """Rows of copies for each request of full batches: one for each token on a CPU, whose pool
    (`copies.CopyPool`) finds a free one."""
    if not serves(device_type):
        return num_first + num_recent
    return RECENT_ROWS * num_recent + FIRST_ROWS * num_first


class DevicePool:
    """The rows of one group of layers, which share block tables and so slots.

    Args:
        num_rows: rows of each layer's buffer.
        num_first: first tokens of a request to be copied, at most UNIT.
        num_recent: newest tokens of a request to be copied.
        block_size: tokens of a block, a multiple of UNIT.
        max_reqs, max_tokens: requests and new tokens of a step, at most; padding included.
        planner: the kernels.

    Raises:
        ValueError: num_first or block_size.
    """

    def __init__(
        self,
        num_rows: int,
        num_first: int,
        num_recent: int,
        block_size: int,
        max_reqs: int,
        max_tokens: int,
        device: torch.device,
        planner: Planner,
    ) -> None:
        if num_first > UNIT or block_size % UNIT:
            raise ValueError(
                f"DevicePool: num_first must be at most {UNIT} and block_size a multiple of it, "
                f"got {num_first} and {block_size}"
            )
        self.num_rows, self.num_first, self.num_recent = num_rows, num_first, num_recent
        wanted_first, wanted_recent = FIRST_ROWS * num_first, RECENT_ROWS * num_recent
        first_units = 0
        if num_first:
            first_units = num_rows * wanted_first // (wanted_first + wanted_recent) // num_first
        # The slot whose copy a row holds, -1 for none. Behind the rows: what is no first token's
        # row may point there.
        self._tags = torch.full((num_rows + UNIT,), -1, dtype=torch.int64, device=device)
        self._table = torch.full(
            (max_reqs, num_first + num_recent), -1, dtype=torch.int32, device=device
        )
        self._rows = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        self._planner, self._wanted = planner, torch.empty_like(self._rows)
        self._plan = FqCudaPlan(
            tags=self._tags.data_ptr(), wanted=self._wanted.data_ptr(),
            rows=self._rows.data_ptr(), table=self._table.data_ptr(), block_size=block_size,
            num_first=num_first, num_recent=num_recent, first_units=first_units,
            recent_units=(num_rows - first_units * num_first) // UNIT,
        )  # fmt: skip

    @property
    def num_used(self) -> int:
        """Rows that hold a copy; waits for the device."""
        return int((self._tags >= 0).sum())

    def step(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> CopyPlan:
        """Plans one step; every layer of the group must carry it out.

        Args:
            query_start_loc: int32 [num_reqs + 1].
            seq_lens: int32 [num_reqs], new tokens included.
            block_table: int32 [at least num_reqs, max_blocks].
            slot_mapping: int64 of the new tokens; -1 is copied nowhere.

        Raises:
            ValueError: dtype, layout or device of a tensor, or more requests or tokens than the
                pool was made for.
        """
        check = functools.partial(check_tensor, "DevicePool.step", device=self._tags.device)
        check("seq_lens", seq_lens, ("num_reqs",), torch.int32)
        check("slot_mapping", slot_mapping, ("num_tokens",), torch.int64)
        num_reqs, num_tokens = seq_lens.shape[0], slot_mapping.shape[0]
        check("query_start_loc", query_start_loc, (num_reqs + 1,), torch.int32)
        check("block_table", block_table, (at_least(num_reqs), "max_blocks"), torch.int32)
        if num_reqs > len(self._table) or num_tokens > len(self._rows):
            raise ValueError(
                f"DevicePool.step: must have at most {len(self._table)} requests and "
                f"{len(self._rows)} new tokens, got {num_reqs} and {num_tokens}; report this model "
                "and command line"
            )
        plan = self._plan
        plan.query_start_loc, plan.seq_lens = query_start_loc.data_ptr(), seq_lens.data_ptr()
        plan.block_table, plan.slots = block_table.data_ptr(), slot_mapping.data_ptr()
        plan.stride_block_table, plan.table_width = block_table.stride(0), block_table.shape[1]
        plan.num_reqs, plan.num_tokens = num_reqs, num_tokens
        self._planner(plan, self._tags.device)
        return CopyPlan(self._table[:num_reqs], self._rows)
