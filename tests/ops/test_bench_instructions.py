# SPDX-License-Identifier: Apache-2.0
"""Counting machine instructions: what `benchmarks.bench_instructions` reports rests on it."""

from __future__ import annotations

import os

import pytest

from benchmarks.bench_instructions import count_instructions


def counted(call):
    try:
        return count_instructions(call)
    except OSError as error:
        pytest.skip(str(error))


def test_a_call_that_does_more_has_more_instructions():
    """The same call has the same count, and ten times the work about ten times as many."""

    def work(times):
        for _ in range(times):
            pass

    none, some, more = (counted(lambda n=n: work(n)) for n in (0, 20, 200))
    assert abs(counted(lambda: work(20)) - some) < 200, "Python's memory differs a little"
    assert some - none > 20
    assert 5 * (some - none) < more - none < 20 * (some - none)


def test_a_call_that_does_not_return_is_told():
    counted(lambda: None)
    with pytest.raises(RuntimeError, match="the call must return"):
        count_instructions(lambda: os._exit(3))
