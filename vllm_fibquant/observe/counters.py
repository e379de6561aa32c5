# SPDX-License-Identifier: Apache-2.0
"""What a worker counts, in a page of memory that the API server can read.

A worker adds to float64 numbers in a page of shared memory; whoever knows the page's path reads
them at any time, without asking the worker. So counting costs a step nothing but the additions,
and the numbers can be had even while the engine is busy or hangs. The page is an anonymous file
(memfd) that ends with its worker and leaves nothing behind; its path, /proc/<pid>/fd/<number>, can
be opened by processes of the same user on the same machine.

One process writes; aligned float64 stores are atomic, so a reader sees old or new numbers, never
halves of both.
"""

from __future__ import annotations

import functools
import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

SCALARS = (
    "steps",
    "tokens",
    "encode_seconds",
    "attend_seconds",
    "non_finite_vectors",
    "self_checks",
    "monitor_enabled",
    "monitor_seconds",
    "monitor_step_seconds",
    "monitor_tokens",
    "monitor_rereads",
    "monitor_changed",
    "monitor_health",
    "monitor_worst_cosine",
)

MAX_LAYERS = 256
"""Layers with a histogram of their own; those above share the last."""

AGES_S = (1.0, 10.0, 60.0, 600.0)
"""Upper ends of the age classes; one more class holds what is older."""

COSINE_BOUNDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
ERROR_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)

# name -> (rows, upper bounds of the buckets); a row is one labelled series.
HISTOGRAMS: dict[str, tuple[int, tuple[float, ...]]] = {
    "cosine_by_layer": (MAX_LAYERS, COSINE_BOUNDS),
    "error_by_layer": (MAX_LAYERS, ERROR_BOUNDS),
    "cosine_by_age": (len(AGES_S) + 1, COSINE_BOUNDS),
    "error_by_age": (len(AGES_S) + 1, ERROR_BOUNDS),
}

_INDEX = {name: i for i, name in enumerate(SCALARS)}
_ENCODE_SECONDS, _ATTEND_SECONDS = _INDEX["encode_seconds"], _INDEX["attend_seconds"]


def _starts() -> tuple[dict[str, int], int]:
    starts, end = {}, len(SCALARS)
    for name, (num_rows, bounds) in HISTOGRAMS.items():
        starts[name] = end
        end += num_rows * (len(bounds) + 2)  # buckets, the one above all bounds, the sum
    return starts, end


_START, _NUM_FIELDS = _starts()
_BYTES = 8 * _NUM_FIELDS


@dataclass(frozen=True)
class Distribution:
    """One row of a histogram.

    Attributes:
        bounds: upper bounds of the buckets but the last, which has none.
        counts: observations in each bucket, not cumulative: len(bounds) + 1.
        total: sum of the observed values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: Distribution) -> Distribution:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.total + other.total)


class Counters:
    """The numbers of one worker.

    Args:
        fd: of a file of at least `_BYTES` bytes; mapped here, and left open.
        writable: whether this process is the one that counts.
    """

    def __init__(self, fd: int, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._numbers = memoryview(mmap.mmap(fd, _BYTES, access=access)).cast("d")
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self.last_attend = 0.0
        """When the last attention op of this process ended, by time.perf_counter."""

    @classmethod
    def create(cls) -> Counters:
        """New counters, all zero, of this process."""
        fd = os.memfd_create("fibquant-counters")
        os.ftruncate(fd, _BYTES)
        return cls(fd, writable=True)

    @classmethod
    def open(cls, path: str) -> Counters:
        """The counters another process of this machine has at `path`, to be read.

        Raises:
            OSError: there are none: the process has ended, is another user's, or another machine's.
            ValueError: what is there has another size.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            counters = cls(fd, writable=False)
        finally:
            os.close(fd)
        counters.path = path
        return counters

    def __getitem__(self, name: str) -> float:
        return self._numbers[_INDEX[name]]

    def __setitem__(self, name: str, number: float) -> None:
        self._numbers[_INDEX[name]] = number

    def stepped(self, num_tokens: int) -> None:
        """Counts one step of the model with `num_tokens` new tokens."""
        self["steps"] += 1
        self["tokens"] += num_tokens

    def encoded(self, began: float) -> None:
        """Counts one encode op that began at `began` by time.perf_counter."""
        self._numbers[_ENCODE_SECONDS] += time.perf_counter() - began

    def attended(self, began: float) -> None:
        """Counts one attention op that began at `began`."""
        self.last_attend = now = time.perf_counter()
        self._numbers[_ATTEND_SECONDS] += now - began

    def observe(self, histogram: str, row: int, number: float) -> None:
        """Adds one observation to a row of a histogram."""
        num_rows, bounds = HISTOGRAMS[histogram]
        start = _START[histogram] + min(row, num_rows - 1) * (len(bounds) + 2)
        self._numbers[start + bisect_left(bounds, number)] += 1
        self._numbers[start + len(bounds) + 1] += number

    def rows(self, histogram: str) -> dict[int, Distribution]:
        """The rows of a histogram that hold an observation."""
        num_rows, bounds = HISTOGRAMS[histogram]
        width = len(bounds) + 2
        found = {}
        for row in range(num_rows):
            start = _START[histogram] + row * width
            numbers: Sequence[float] = self._numbers[start : start + width].tolist()
            counts = tuple(int(n) for n in numbers[:-1])
            if any(counts):
                found[row] = Distribution(bounds, counts, numbers[-1])
        return found


def age_row(seconds: float) -> int:
    """The age class of something `seconds` old."""
    return bisect_left(AGES_S, seconds)


@functools.cache
def own_counters() -> Counters:
    """The counters of this process."""
    return Counters.create()
