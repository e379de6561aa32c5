# SPDX-License-Identifier: Apache-2.0
"""The fidelity monitor of a GPU, on CPU tensors: it finds what the CPU's finds, in later steps."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.observe.test_monitor import HEAD_DIM, NUM_BLOCKS, NUM_KV_HEADS, Bench
from vllm_fibquant.observe import monitor
from vllm_fibquant.observe.ledger import DAMAGED, HEALTHY, UNKNOWN
from vllm_fibquant.observe.monitor import Step


class DeviceBench(Bench):
    """A bench whose monitor is a GPU's; steps are padded at their end."""

    def __init__(self, preset="fibquant_3bit", tokens=4096, **options):
        super().__init__(preset, tokens, waits=False, **options)

    def plan(self, bounds, seq_lens, table, slots):
        return super().plan(
            np.append(bounds, bounds[-1]), np.append(seq_lens, 0).astype(np.int32),
            np.append(table, table[:1], 0), np.append(slots, [-1, -1, 0]),
        )  # fmt: skip

    def receive(self):
        self.monitor._receive()


LONG = ([20, 21], 0, 20)
"""A prompt beside which a step is not one of a captured graph."""


def test_a_prompt_is_sampled_and_compared_again_while_it_is_read():
    bench = DeviceBench(tokens=64)
    assert bench.step(([1, 2, 3, 4], 0, 50)).first_row is not None
    assert bench.num_compared == 0, "the host has not looked yet"
    assert bench.step(([1, 2, 3, 4], 50, 1)) is None, "such a step may be a graph"
    assert bench.num_compared == 1 and bench.counters["monitor_tokens"] == 50
    bench.monitor._plan_new = lambda *args: None
    for number in range(1, 7):
        assert bench.step(([1, 2, 3, 4], 50 + number, 1), LONG).first_row is None
        bench.receive()
        assert bench.counters["monitor_rereads"] == number
    assert bench.counters["monitor_changed"] == 0 and bench.num_compared == 7
    assert 0.9 < bench.cosine() < 0.999 and bench.health in (UNKNOWN, HEALTHY)


def test_a_long_speculation_is_no_prompt():
    """21 tokens may be one that was accepted and 20 proposed ones: such a step may be a graph."""
    assert DeviceBench(num_speculative=20).step(([1, 2], 0, 21)) is None
    assert DeviceBench(num_speculative=20).step(([1, 2], 0, 22)) is not None
    assert DeviceBench().step(([1, 2], 0, 21)) is not None


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_the_cpus_monitor_finds(seed):
    """The same steps and the same choices: the same comparisons, where both are made."""
    benches = Bench("fibquant_2bit"), DeviceBench("fibquant_2bit")
    random = np.random.default_rng(seed)
    blocks = random.permutation(NUM_BLOCKS - 1)[:12] + 1
    for begin in (0, 60, 120):
        for bench in benches:
            bench.step((blocks, begin, 60))
    benches[1].receive()
    expected, found = (bench.counters.rows("cosine_by_layer")[0] for bench in benches)
    assert found.count == expected.count == 3
    assert found.total == pytest.approx(expected.total, abs=1e-4)


def test_a_sample_ends_when_one_of_its_slots_is_written_again():
    bench = DeviceBench(tokens=64)
    bench.step(([1, 2], 0, 32))
    bench.monitor._plan_new = lambda *args: None
    bench.step(([3], 0, 1))
    assert bench.monitor._holds[bench.monitor._samples[0].place], "another block was written"
    bench.step(([2], 0, 1))
    assert not bench.monitor._holds.any()
    bench.step(([1, 2, 3], 33, 1), LONG)
    bench.receive()
    assert bench.monitor.num_samples == bench.counters["monitor_rereads"] == 0
    assert bench.counters["monitor_tokens"] == 0 and bench.num_compared == 1


def test_a_slot_written_in_the_very_step_that_would_read_it():
    bench = DeviceBench(tokens=64)
    bench.step(([1, 2], 0, 32))
    bench.monitor._plan_new = lambda *args: None
    assert bench.step(([1, 2, 3], 32, 1), ([2], 0, 16)) is not None
    bench.receive()
    assert bench.counters["monitor_rereads"] == 0 and bench.counters["monitor_changed"] == 0


def test_a_slot_written_twice_in_a_step_is_not_sampled():
    for other in (19, -1):
        bench, slots = DeviceBench(), np.arange(16, 36)
        slots[7] = other
        bench.step(([1, 2], 0, 20), slots=slots)
        bench.receive()
        assert bench.monitor.num_samples == bench.num_compared == 0


def test_tokens_nobody_reads_are_not_compared():
    bench = DeviceBench(tokens=64)
    bench.step(([1, 2], 0, 32))
    bench.monitor._plan_new = lambda *args: None
    for request in (([4, 5], 0, 1), ([1, 5], 31, 1)):
        bench.step(request, LONG)
        bench.receive()
        assert bench.counters["monitor_rereads"] == 0
    bench.step(([1, 2, 5], 32, 1), LONG)
    bench.receive()
    assert bench.counters["monitor_rereads"] == 1


def test_a_sliding_window_layer_compares_what_it_sees():
    bench = DeviceBench(window=40, tokens=64)
    blocks = list(range(1, 9))
    bench.step((blocks, 0, 64))
    (sample,) = bench.monitor._samples
    assert sample.length <= 40 and int(sample.end) - sample.length >= 64 - 40
    bench.monitor._plan_new = lambda *args: None
    bench.step((blocks, 110, 1), LONG)
    bench.receive()
    assert bench.counters["monitor_rereads"] == 0


def test_memory_is_bounded_and_layers_take_turns():
    bench = DeviceBench(tokens=128, num_layers=3)
    for number in range(20):
        bench.step(([2 * number % 30 + 1, 2 * number % 30 + 2], 0, 32))
        assert bench.monitor.num_samples <= 2
        assert bench.counters["monitor_tokens"] <= 128
    bench.receive()
    assert sorted(bench.counters.rows("cosine_by_layer")) == [0, 1, 2]


def test_vectors_with_nan_are_left_to_their_own_counter():
    bench = DeviceBench()
    bench.change_keys = lambda key: key.index_fill(-1, torch.tensor([3]), torch.nan)
    bench.step(([1, 2], 0, 32))
    bench.receive()
    assert bench.monitor.num_samples == bench.num_compared == 0


def test_drill_a_page_overwritten_behind_our_back():
    bench = DeviceBench(tokens=64)
    bench.step(([1, 2, 3], 0, 48))
    bench.monitor._plan_new = lambda *args: None
    bench.caches[0][2, :, 5] ^= 0xFF
    bench.step(([1, 2, 3], 48, 1), LONG)
    bench.receive()
    assert bench.counters["monitor_changed"] == 1 and bench.health == DAMAGED
    assert bench.monitor.num_samples == 0


def test_the_budget_is_kept(monkeypatch):
    """A comparison takes 2 ms of the device, whatever this machine does meanwhile."""
    monkeypatch.setattr(monitor._Clock, "seconds", 2e-3)
    bench = DeviceBench(budget=0.01)
    for _ in range(300):
        bench.ledger._step_began = time.perf_counter() - 0.05  # a step of 50 ms
        bench.step(([1, 2], 0, 32))
    bench.receive()
    steps = bench.counters["monitor_step_seconds"]
    assert 0 < bench.num_compared * 2e-3 <= 0.01 * steps + 2e-3
    assert bench.counters["monitor_seconds"] >= bench.num_compared * 2e-3
    bench.ledger._step_began = time.perf_counter() - 60  # nobody asked anything for a minute
    bench.step(([1, 2], 0, 32))
    grown = bench.counters["monitor_step_seconds"] - steps
    assert grown == pytest.approx(monitor.MAX_STEP_S)


@pytest.mark.parametrize("chunk", [0, 64])
def test_nothing_waits_for_the_device(chunk, monkeypatch):
    """What a host would have to wait for on a GPU is asked of no tensor of a step."""
    bench = DeviceBench(tokens=64)
    for layer in bench.layers:
        layer.attend = replace(layer.attend, chunk=chunk)

    def refuse(*args, **kwargs):
        raise AssertionError("waits for the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    bounds, seq_lens = np.array([0, 32], np.int32), torch.tensor([32], dtype=torch.int32)
    table = torch.zeros(1, NUM_BLOCKS, dtype=torch.int32)
    step = Step(torch.from_numpy(bounds), seq_lens, table, torch.arange(32))
    if chunk:
        assert bench.monitor.plan(bounds, step) is None, "what its last token sees is not known"
        step = step._replace(host_lens=np.array([32], np.int32))
    probe = bench.monitor.plan(bounds, step)
    monkeypatch.setattr(bench.monitor, "_read_pages", lambda sample, query, cache: query.clone())
    new = (torch.randn(32, heads, HEAD_DIM) for heads in (4, NUM_KV_HEADS, NUM_KV_HEADS))
    probe.run(bench.layers[0], *new, bench.caches[0])
    bench.monitor._receive = lambda: None
    bench.monitor._plan_new = lambda *args: None
    again = bench.monitor.plan(bounds, step)
    new = (torch.randn(32, heads, HEAD_DIM) for heads in (4, NUM_KV_HEADS, NUM_KV_HEADS))
    again.run(bench.layers[0], *new, bench.caches[0])
    assert len(bench.monitor._sent) == 2
