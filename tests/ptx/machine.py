# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel: many CTAs at once, a register an array with one element a thread.

Of the threads that can go on, those at the lowest place run, all of them together, to the end of
their basic block: loops meet again behind their end. Threads of a warp that come to a collective
wait for the rest of it, those at bar.sync for their CTA; if nobody can go on, that is a deadlock.
What threads compute that are not at this place is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.lower import Active, Lowering
from tests.ptx.memory import Global, Shared, Where
from tests.ptx.parse import Fault, Instruction, Kernel

END = 1 << 30
MOST_THREADS = 4096
"""Threads that run at once, in whole CTAs, at least one."""


@dataclass
class Block:
    """Instructions that run one after the other.

    Attributes:
        scope: "warp" or "cta" where the first instruction needs all threads of one.
        end: position of what follows.
        branch: the instruction it ends with, bra or ret, or None.
    """

    scope: str | None
    steps: list[tuple[Instruction, Callable[[Active], None]]]
    end: int
    branch: Instruction | None


def scope_of(instruction: Instruction) -> str | None:
    if instruction.op[0] == "bar" and instruction.op[1] != "warp":
        return "cta"
    return "warp" if "sync" in instruction.op else None


def run(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    params: bytes,
    regions: list[tuple[int, int]],
    allow_unwritten: bool = False,
) -> set[str]:
    """Runs a kernel on memory of this process.

    Args:
        grid: CTAs in x, y and z.
        threads: of a CTA, whole warps.
        params: the bytes of the kernel's parameter.
        regions: (address, bytes) of the allocations it may touch.
        allow_unwritten: whether it may read shared memory that it has not written.

    Returns:
        The opcodes that ran.

    Raises:
        Fault: what a GPU would do wrong, or what the interpreter does not know.
    """  # fmt: skip
    if threads % 32 or threads > kernel.max_threads:
        raise Fault(
            f"run: threads must be whole warps, at most {kernel.max_threads}, got {threads}"
        )
    if len(params) != kernel.param_bytes:
        raise Fault(f"run: params must be {kernel.param_bytes} bytes, got {len(params)}")
    ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    memory, seen = Global(regions), set()
    at_once = max(1, MOST_THREADS // threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(ctas), at_once):
            where = Where(threads, ctas[first : first + at_once])
            shared = Shared(where, shared_bytes, allow_unwritten)
            machine = Machine(kernel, grid, where, shared, memory, params)
            machine.run()
            seen |= machine.seen
    return seen


class Machine:
    """One batch of CTAs."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], where: Where, shared: Shared,
        memory: Global, params: bytes,
    ) -> None:  # fmt: skip
        self.kernel, self.where, self.shared = kernel, where, shared
        self.lowering = Lowering(kernel, grid, where, shared, memory, params)
        self.lanes = len(where.ctas) * where.threads
        self.starts = {0, *kernel.labels.values()}
        self.blocks: dict[int, Block] = {}
        self.seen: set[str] = set()
        self.pc = np.zeros(self.lanes, np.int64)
        self.blocked = np.zeros(self.lanes, np.bool_)
        self.live = self.lanes  # threads that have not ended

    def block(self, at: int) -> Block:
        """The basic block that begins here."""
        if at not in self.blocks:
            steps, i, body = [], at, self.kernel.body
            branch = None
            while i < len(body):
                instruction = body[i]
                if i > at and (i in self.starts or scope_of(instruction)):
                    break
                i += 1
                if instruction.op[0] in ("bra", "ret", "exit"):
                    branch = instruction
                    break
                steps.append((instruction, self.lowering.lower(instruction)))
                self.seen.add(".".join(instruction.op))
            scope = scope_of(body[at]) if at < len(body) else None
            self.blocks[at] = Block(scope, steps, i, branch)
        return self.blocks[at]

    def run(self) -> None:
        while (found := self.choose()) is not None:
            at, active = found
            while at is not None:  # while all threads stay together
                block = self.block(at)
                for instruction, step in block.steps:
                    try:
                        step(active)
                    except Fault as fault:
                        raise Fault(f"{fault} in {self.kernel.name}, {instruction}") from None
                at = self.leave(block, active)

    def choose(self) -> tuple[int, Active] | None:
        """The place where threads run next, and which; None when all have ended."""
        while True:
            at = int(np.where(self.blocked, END, self.pc).min())
            if at == END:
                waiting = self.blocked & (self.pc < END)
                if not waiting.any():
                    return None
                lane = int(np.flatnonzero(waiting)[0])
                instruction = self.kernel.body[int(self.pc[lane])]
                raise self.where.fault(lane, f"deadlock: waits for others at {instruction}")
            here = self.pc == at
            scope = self.block(at).scope
            if scope is not None:
                width = 32 if scope == "warp" else self.where.threads
                whole = np.repeat(here.reshape(-1, width).all(1), width)
                self.blocked |= here & ~whole
                here &= whole
                if not here.any():
                    continue
            self.blocked[here] = False
            return at, Active(here)

    def leave(self, block: Block, active: Active) -> int | None:
        """Moves threads on; where, if they are all there are and stay together."""
        branch, takes, target = block.branch, active.mask, block.end
        if branch is not None:
            target = self.kernel.labels[branch.operands[0]] if branch.op[0] == "bra" else END
            if branch.guard:
                takes = active.mask & self.lowering.predicate(branch.guard)
        if target == END and takes.any():
            gone = np.flatnonzero(takes)
            self.shared.leave(gone)
            self.live -= len(gone)
        count = int(np.count_nonzero(takes))
        if active.count == self.live and target != END and count in (0, active.count):
            at = target if count else block.end
            if self.block(at).scope is None or active.whole(self.where.threads):
                return at
        self.pc[active.mask] = block.end
        self.pc[takes] = target
        return None
