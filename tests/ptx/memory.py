# SPDX-License-Identifier: Apache-2.0
"""Memory, and what a GPU would not say about its use.

Every access is checked: inside an allocation, aligned to its size. Of shared memory also: written
before it is read, and no two threads at one place, one of them writing, without a barrier between
that both have passed. Time is a number that grows at each barrier; an access is over for a thread
if the thread has passed a barrier of its CTA since, or, when the other thread is of its warp, a
barrier of the warp. Shuffles and products order nothing. Granules are two bytes.

Asynchronous copies reach shared memory when their thread waits for them, and not before: until
then nobody may touch their target. What they read is read when they start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.parse import Fault

GRANULE = 2
NEVER, MANY = -1, 1 << 30  # times of places that nobody touched; readers of several warps


@dataclass
class Where:
    """For messages: threads of a CTA, and the CTA of index 0 of this batch."""

    threads: int
    ctas: list[tuple[int, int, int]]

    def fault(self, lane: int, what: str) -> Fault:
        return Fault(
            f"{what} (CTA {self.ctas[lane // self.threads]}, thread {lane % self.threads})"
        )


def check_alignment(where: Where, lanes, at, size: int) -> None:
    if (bad := at % size != 0).any():
        raise where.fault(
            int(lanes[bad][0]), f"address {int(at[bad][0]):#x} is no multiple of {size}"
        )


class Global:
    """Allocations of this process, at their own addresses.

    Args:
        regions: (address, bytes) of each; they do not overlap.
    """

    def __init__(self, regions: list[tuple[int, int]]) -> None:
        regions = sorted(regions) or [(16, 0)]
        self.starts = np.array([at for at, _ in regions], np.uint64)
        self.ends = np.array([at + size for at, size in regions], np.uint64)
        self.base = regions[0][0] & ~15
        end = -(-max(at + size for at, size in regions) // 16) * 16

        class Whole:
            __array_interface__ = {
                "shape": (end - self.base,), "typestr": "|u1", "data": (self.base, False),
                "version": 3,
            }  # fmt: skip

        memory = np.asarray(Whole())  # only what the regions hold is ever touched
        self.views = {size: memory.view(f"u{size}") for size in (1, 2, 4, 8)}

    def places(self, where: Where, lanes, at, size: int, count: int):
        """Indices [threads, count] of elements of `size` bytes."""
        check_alignment(where, lanes, at, size * count)
        region = np.searchsorted(self.starts, at, "right") - 1
        bad = (region < 0) | (at + np.uint64(size * count) > self.ends[region])
        if bad.any():
            raise where.fault(
                int(lanes[bad][0]), f"global address {int(at[bad][0]):#x} is in no allocation"
            )
        first = (at - np.uint64(self.base)).astype(np.int64) // size
        return first[:, None] + np.arange(count)

    def load(self, where: Where, lanes, at, size: int, count: int):
        return self.views[size][self.places(where, lanes, at, size, count)]

    def store(self, where: Where, lanes, at, values) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        self.views[size][self.places(where, lanes, at, size, count)] = values

    def add(self, where: Where, lanes, at, values):
        """Atomic; returns what was there before each addition, in order of threads."""
        places, memory = self.places(where, lanes, at, 4, 1)[:, 0], self.views[4]
        old = np.empty_like(values)
        for i, place in enumerate(places):
            old[i] = memory[place]
            memory[place] += values[i]
        return old


@dataclass
class Copies:
    """One cp.async: its threads, the number of the group of each, places [threads, 4], words."""

    lanes: np.ndarray
    group: np.ndarray
    places: np.ndarray
    words: np.ndarray


class Shared:
    """Shared memory of a batch of CTAs, one behind the other.

    Args:
        size: bytes of one CTA; every byte begins as 0xFF.
        allow_unwritten: whether memory may be read that nobody wrote.
    """

    def __init__(self, where: Where, size: int, allow_unwritten: bool) -> None:
        self.where, self.size, self.allow_unwritten = where, size, allow_unwritten
        ctas = len(where.ctas)
        self.stride = -(-size // 16) * 16
        memory = np.full(ctas * self.stride, 0xFF, np.uint8)
        self.views = {width: memory.view(f"u{width}") for width in (1, 2, 4, 8)}
        granules, lanes = len(memory) // GRANULE, ctas * where.threads
        self.written, self.writer = (np.full(granules, NEVER, t) for t in (np.int64, np.int32))
        self.read, self.reader = (np.full(granules, NEVER, t) for t in (np.int64, np.int32))
        self.in_flight = np.zeros(granules, np.bool_)
        self.now = 0
        self.cta_sync, self.warp_sync = (np.zeros(lanes, np.int64) for _ in range(2))
        self.commits = np.zeros(lanes, np.int64)
        self.copies: list[Copies] = []

    # ---- order

    def sync(self, lanes, whole_cta: bool) -> None:
        """All of these threads, whole warps or whole CTAs, meet."""
        self.now += 1
        self.warp_sync[lanes] = self.now
        if whole_cta:
            self.cta_sync[lanes] = self.now

    def _race(self, what: str, lanes, granules, time, who) -> None:
        """Faults if an access at `time` by `who` is not over for `lanes`; [threads, granules]."""
        open_ = time >= self.cta_sync[lanes]
        if not open_.any():
            return
        # A warp's readers are -2 - warp if several, MANY if of several warps.
        warp = np.where(who < NEVER, -2 - who, who // 32)
        same_warp = (warp == lanes // 32) & (who != MANY)
        open_ &= (who != lanes) & (~same_warp | (time >= self.warp_sync[lanes]))
        if open_.any():
            lane, granule = int(lanes[open_][0]), int(granules[open_][0])
            raise self.where.fault(
                lane, f"{what} without a barrier between, at shared address "
                f"{granule * GRANULE % self.stride}, the other by {self._name(int(who[open_][0]))}",
            )  # fmt: skip

    def _name(self, who: int) -> str:
        if who == MANY:
            return "threads of several warps"
        if who < NEVER:
            return f"several threads of warp {(-2 - who) % (self.where.threads // 32)}"
        return f"thread {who % self.where.threads}"

    def _granules(self, lanes, at, size: int):
        """Threads and granules [threads, size / 2] of accesses, after all checks of place."""
        check_alignment(self.where, lanes, at, size)
        if (bad := at + size > self.size).any():
            raise self.where.fault(
                int(lanes[bad][0]),
                f"shared address {int(at[bad][0])} + {size} is beyond {self.size}",
            )
        first = (lanes // self.where.threads * self.stride + at) // GRANULE
        granules = first[:, None] + np.arange(-(-size // GRANULE))
        if self.copies and (bad := self.in_flight[granules]).any():
            raise self.where.fault(
                int(lanes[bad.any(1)][0]), "an asynchronous copy to here has not been waited for"
            )
        return np.broadcast_to(lanes[:, None], granules.shape), granules

    def _note_reads(self, lanes, g) -> None:
        time, who = self.read[g], self.reader[g]
        alone = (time < self.cta_sync[lanes]) | (who == lanes) | (who == NEVER)
        warp = np.where(who < NEVER, -2 - who, who // 32)
        same_warp = (warp == lanes // 32) & (who != MANY)
        alone |= same_warp & (time < self.warp_sync[lanes])
        new = np.where(alone, lanes, np.where(same_warp, -2 - lanes // 32, MANY)).astype(np.int32)
        self.reader[g] = new
        now = self.reader[g]  # where several read at once, one of them has won
        lost = now != new
        if lost.any():
            others = np.where(now < NEVER, -2 - now, now // 32)
            of_warp = (others == lanes // 32) & (now != MANY) & (new != MANY)
            self.reader[g[lost & of_warp]] = (-2 - lanes // 32)[lost & of_warp]
            self.reader[g[lost & ~of_warp]] = MANY
        self.read[g] = self.now

    def _note_writes(self, lanes, g) -> None:
        self._race("two writes", lanes, g, self.written[g], self.writer[g])
        self._race("a read and a write", lanes, g, self.read[g], self.reader[g])
        self.written[g], self.writer[g] = self.now, lanes
        if (lost := self.writer[g] != lanes).any():
            raise self.where.fault(int(lanes[lost][0]), "two threads write one place at once")

    # ---- accesses

    def load(self, where: Where, lanes, at, size: int, count: int):
        wide, g = self._granules(lanes, at, size * count)
        time = self.written[g]
        if not self.allow_unwritten and (bad := time == NEVER).any():
            raise where.fault(
                int(wide[bad][0]), f"shared address {int(g[bad][0]) * GRANULE % self.stride} is "
                "read before anything is written",
            )  # fmt: skip
        self._race("a write and a read", wide, g, time, self.writer[g])
        self._note_reads(wide, g)
        at = lanes // where.threads * self.stride + at
        return self.views[size][at[:, None] // size + np.arange(count)]

    def store(self, where: Where, lanes, at, values) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        if size * count < GRANULE:  # two threads could share a granule without a race
            raise Fault("stores of single bytes to shared memory are not checked")
        wide, g = self._granules(lanes, at, size * count)
        self._note_writes(wide, g)
        self.views[size][g[:, :1] * GRANULE // size + np.arange(count)] = values

    def copy(self, lanes, at, words) -> None:
        """Starts copies of 16 bytes a thread."""
        wide, g = self._granules(lanes, at, 16)
        self._note_writes(wide, g)
        self.in_flight[g] = True
        self.copies.append(Copies(lanes, self.commits[lanes].copy(), g, words))

    def commit(self, lanes) -> None:
        self.commits[lanes] += 1

    def wait(self, lanes, pending: int) -> None:
        """The copies of all but each thread's last `pending` groups arrive."""
        waits = np.zeros(len(self.commits), np.bool_)
        waits[lanes] = True
        left = []
        for copies in self.copies:
            done = waits[copies.lanes] & (copies.group < self.commits[copies.lanes] - pending)
            g = copies.places[done]
            self.views[4][g[:, :1] * GRANULE // 4 + np.arange(4)] = copies.words[done]
            self.in_flight[g] = False
            self.written[g], self.writer[g] = self.now, copies.lanes[done][:, None]
            if not done.all():
                keep = ~done
                left.append(
                    Copies(*(x[keep] for x in (copies.lanes, copies.group, copies.places,
                                               copies.words)))
                )  # fmt: skip
        self.copies = left

    def leave(self, lanes) -> None:
        """Threads end."""
        for copies in self.copies:
            if (bad := np.isin(copies.lanes, lanes)).any():
                raise self.where.fault(int(copies.lanes[bad][0]), "ends before its copies arrived")
