# SPDX-License-Identifier: Apache-2.0
"""Counters: one process writes, another reads."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from vllm_fibquant.observe.counters import (
    AGES_S,
    HISTOGRAMS,
    MAX_LAYERS,
    SCALARS,
    Counters,
    Distribution,
    age_row,
    own_counters,
)


def test_they_start_at_zero_and_do_not_overlap():
    counters = Counters.create()
    assert [counters[name] for name in SCALARS] == [0.0] * len(SCALARS)
    assert all(counters.rows(name) == {} for name in HISTOGRAMS)
    for number, name in enumerate(SCALARS, 1):
        counters[name] = number
    for name, (num_rows, _) in HISTOGRAMS.items():
        counters.observe(name, 0, 0.5)
        counters.observe(name, num_rows - 1, 0.25)
    assert [counters[name] for name in SCALARS] == list(range(1, len(SCALARS) + 1))
    for name, (num_rows, _) in HISTOGRAMS.items():
        rows = counters.rows(name)
        assert {row: found.total for row, found in rows.items()} == {0: 0.5, num_rows - 1: 0.25}


def test_another_process_reads_them_while_they_change():
    counters = Counters.create()
    code = (
        "import sys\n"
        "from vllm_fibquant.observe.counters import Counters\n"
        "counters = Counters.open(sys.argv[1])\n"
        "for _ in range(2):\n"
        "    print(counters['steps'], counters.rows('error_by_layer')[3].count, flush=True)\n"
        "    sys.stdin.readline()\n"
        "try:\n"
        "    counters['steps'] = 7\n"
        "except TypeError:\n"
        "    print('read only')\n"
    )
    counters.stepped(num_tokens=9)
    counters.observe("error_by_layer", 3, 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", code, counters.path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdout.readline() == "1.0 1\n"
        counters.stepped(num_tokens=1)
        counters.observe("error_by_layer", 3, 0.1)
        print(file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "2.0 2\n"
        print(file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "read only\n"
    assert counters["tokens"] == 10


def test_what_is_not_there_or_no_page_of_counters_is_refused(tmp_path):
    with pytest.raises(OSError):
        Counters.open("/proc/1/fd/999999")
    (tmp_path / "short").write_bytes(b"no")
    with pytest.raises(ValueError):
        Counters.open(str(tmp_path / "short"))


def test_time_is_summed():
    counters = Counters.create()
    for _ in range(3):
        counters.encoded(time.perf_counter() - 0.5)
        counters.attended(time.perf_counter() - 0.25)
    assert counters["encode_seconds"] == pytest.approx(1.5, abs=0.1)
    assert counters["attend_seconds"] == pytest.approx(0.75, abs=0.1)
    assert counters.last_attend == pytest.approx(time.perf_counter(), abs=0.1)


def test_buckets_hold_what_prometheus_says_they_hold():
    """le is inclusive, and what exceeds all bounds is in the last bucket."""
    counters = Counters.create()
    bounds = HISTOGRAMS["error_by_age"][1]
    for value in (bounds[0], bounds[0] + 1e-9, bounds[-1], 99.0):
        counters.observe("error_by_age", 1, value)
    found = counters.rows("error_by_age")[1]
    assert found.counts[:2] == (1, 1)
    assert found.counts[-2:] == (1, 1)
    assert found.count == 4
    assert found + found == Distribution(
        bounds, tuple(2 * n for n in found.counts), 2 * found.total
    )


def test_layers_beyond_the_last_share_it():
    counters = Counters.create()
    counters.observe("cosine_by_layer", MAX_LAYERS + 40, 0.9)
    assert list(counters.rows("cosine_by_layer")) == [MAX_LAYERS - 1]


def test_age_classes():
    assert age_row(0.0) == 0
    assert [age_row(seconds) for seconds in AGES_S] == [0, 1, 2, 3]
    assert age_row(AGES_S[-1] + 1) == len(AGES_S)


def test_a_process_has_one_page():
    assert own_counters() is own_counters()
