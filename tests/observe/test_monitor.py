# SPDX-License-Identifier: Apache-2.0
"""The fidelity monitor: what it compares, when samples end, what it notices and costs."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.observe import ledger, monitor
from vllm_fibquant.observe.counters import Counters
from vllm_fibquant.observe.ledger import DAMAGED, DEGRADED, HEALTHY, UNKNOWN, Ledger
from vllm_fibquant.observe.monitor import Monitor, Step
from vllm_fibquant.ops import Attend, cpu_tables
from vllm_fibquant.options import MonitorOptions

HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS, NUM_HEADS, NUM_KV_HEADS = 64, 16, 32, 4, 2


class Bench:
    """A cache, a layer and a monitor with unlimited budget, driven step by step; a CPU's monitor
    unless it `waits` not."""

    def __init__(
        self, preset="fibquant_3bit", tokens=4096, window=0, num_layers=1, budget=1e9,
        waits=True, num_speculative=0,
    ):  # fmt: skip
        self.codec = KVCodec.from_preset(preset, HEAD_DIM)
        self.layers = [
            SimpleNamespace(
                codec=self.codec, attend=Attend(HEAD_DIM**-0.5, window), num_heads=NUM_HEADS,
                num_kv_heads=NUM_KV_HEADS, pages=lambda cache: ops.pages_of(cache, self.codec),
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self.counters = Counters.create()
        self.ledger = Ledger(budget, self.counters)
        self.monitor = Monitor(
            MonitorOptions(tokens=tokens), self.layers, list(range(num_layers)), BLOCK_SIZE,
            self.ledger, torch.device("cpu"), waits, num_speculative,
        )  # fmt: skip
        shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, self.codec.layout.record_bytes)
        self.caches = [torch.full(shape, 0xFF, dtype=torch.uint8) for _ in self.layers]
        self.random = torch.Generator().manual_seed(0)
        self.change_keys = lambda key: key

    def step(self, *requests, slots=None):
        """One step of requests (blocks, tokens cached before, new tokens); returns the probe."""
        self.counters.last_attend = time.perf_counter()
        bounds = np.cumsum([0, *(new for _, _, new in requests)]).astype(np.int32)
        seq_lens = np.array([cached + new for _, cached, new in requests], np.int32)
        table = np.zeros((len(requests), NUM_BLOCKS), np.int32)
        mapped = []
        for req, (blocks, cached, new) in enumerate(requests):
            table[req, : len(blocks)] = blocks
            positions = np.arange(cached, cached + new)
            mapped.append(table[req, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        slots = np.concatenate(mapped).astype(np.int64) if slots is None else slots
        probe = self.plan(bounds, seq_lens, table, slots)

        def random(heads):
            return torch.randn(len(slots), heads, HEAD_DIM, generator=self.random)

        for layer, cache in zip(self.layers, self.caches, strict=True):
            key, value, query = random(NUM_KV_HEADS), random(NUM_KV_HEADS), random(NUM_HEADS)
            key = self.change_keys(key)
            pages = ops.pages_of(cache, self.codec)
            ops.encode_kv(key, value, torch.from_numpy(slots), pages)
            if probe:
                probe.run(layer, query, key, value, cache)
        return probe

    def plan(self, *batch):
        return self.monitor.plan(batch[0], Step(*map(torch.from_numpy, batch)))

    @property
    def health(self):
        return int(self.counters["monitor_health"])

    @property
    def num_compared(self):
        return sum(row.count for row in self.counters.rows("cosine_by_layer").values())

    def cosine(self, layer=0):
        found = self.counters.rows("cosine_by_layer")[layer]
        return found.total / found.count


def test_a_prompt_is_sampled_and_compared_again_while_it_is_read():
    bench = Bench()
    assert bench.step(([1, 2, 3, 4], 0, 50)).first_row is not None
    assert bench.counters["monitor_tokens"] == 50
    for number in range(1, 9):
        probe = bench.step(([1, 2, 3, 4], 49 + number, 1))
        assert probe.first_row is None, "one new token is no sample: the old one is compared again"
        assert bench.counters["monitor_rereads"] == number
    assert bench.counters["monitor_changed"] == 0
    assert bench.health == HEALTHY
    assert 0.9 < bench.cosine() < 0.999


def test_what_is_compared_is_the_attention_of_that_head_over_those_tokens():
    """Against decoded records, which the monitor does not use itself."""
    bench = Bench("fibquant_2bit")
    bench.step(([5, 7, 6, 9, 8], 0, 80))
    (sample,) = bench.monitor._samples
    assert sample.length == monitor.MAX_TOKENS
    slots = bench.monitor._slots[sample.place]
    records = bench.caches[0][slots // BLOCK_SIZE, sample.head, slots % BLOCK_SIZE]
    key, value = bench.codec.decode_records(records)
    heads = slice(2 * sample.head, 2 * sample.head + 2)
    from_codes = ledger.exact_attention(sample.query[0, heads], key, value, HEAD_DIM**-0.5, 0.0)
    torch.testing.assert_close(sample.output[0, heads], from_codes, rtol=0, atol=1e-5)
    exact = ledger.exact_attention(
        sample.query[0, heads], sample.key, sample.value, HEAD_DIM**-0.5, 0.0
    )
    cosine = torch.cosine_similarity(from_codes, exact, dim=-1).mean()
    assert bench.cosine() == pytest.approx(float(cosine), abs=1e-5)


def test_a_sample_ends_when_one_of_its_slots_is_written_again():
    bench = Bench()
    bench.step(([1, 2], 0, 32))
    bench.step(([3], 0, 1))
    assert bench.monitor.num_samples == 1, "another block was written"
    bench.step(([2], 0, 1))
    assert bench.monitor.num_samples == 0
    assert bench.counters["monitor_tokens"] == 0


def test_a_slot_written_in_the_very_step_that_would_read_it():
    """One request reads a block that another one writes in this step: the sample is gone before."""
    bench = Bench()
    bench.step(([1, 2], 0, 32))
    probe = bench.step(([1, 2, 3], 32, 1), ([2], 0, 8))
    assert probe is None
    assert bench.counters["monitor_rereads"] == 0


def test_a_slot_written_twice_in_a_step_is_not_sampled():
    bench = Bench()
    slots = np.arange(16, 36)
    for other in (slots[3], -1):
        slots[7] = other
        bench.step(([1, 2], 0, 20), slots=slots)
        assert bench.monitor.num_samples == bench.num_compared == 0


def test_tokens_nobody_reads_are_not_compared():
    """Pages of a finished request may be given to layers the monitor does not see."""
    bench = Bench()
    bench.step(([1, 2], 0, 32))
    assert bench.step(([4, 5], 0, 1)) is None
    assert bench.step(([1, 5], 31, 1)) is None, "only one of its blocks"
    assert bench.step(([1, 2, 5], 32, 1)) is not None, "found in the prefix cache"


def test_a_step_looks_at_few_samples_and_the_next_ones_at_the_others(monkeypatch):
    monkeypatch.setattr(monitor, "TRIED", 3)
    looked = []
    readers = Monitor._readers
    monkeypatch.setattr(
        Monitor, "_readers", lambda self, *args: looked.append(args) or readers(self, *args)
    )
    bench = Bench()
    for number in range(8):
        bench.step(([3 * number + 1, 3 * number + 2], 0, 32))
    steps = 0
    while bench.step(([22, 23, 24], 32, 1)) is None:  # the last sample's
        steps += 1
        assert len(looked) == 3 * steps
    assert steps == 2, "eight samples, three a step"


def test_a_sliding_window_layer_compares_what_it_sees():
    bench = Bench(window=40)
    blocks = list(range(1, 9))
    bench.step((blocks, 0, 64))
    (sample,) = bench.monitor._samples
    begin = int(sample.end) - sample.length
    assert begin >= 64 - 40
    assert sample.length <= 40
    assert bench.step((blocks, 64, 1)) is not None or begin <= 64 - 40
    assert bench.step((blocks, 110, 1)) is None


def test_long_requests_and_shuffled_blocks_read_right():
    bench = Bench("fibquant_4bit")
    blocks = np.random.default_rng(1).permutation(NUM_BLOCKS - 1)[:20] + 1
    for begin in range(0, 300, 100):
        bench.step((blocks, begin, 100))
    assert bench.cosine() > 0.95, "tokens at the wrong positions would not be alike"


def test_memory_is_bounded():
    bench = Bench(tokens=128)
    for number in range(20):
        bench.step(([2 * number % 30 + 1, 2 * number % 30 + 2], 0, 32))
        assert bench.monitor.num_samples <= 2
        assert bench.counters["monitor_tokens"] <= 128


def test_layers_take_turns():
    bench = Bench(num_layers=3)
    for number in range(12):
        bench.step(([number + 1, number + 2], 0, 20))
    assert sorted(bench.counters.rows("cosine_by_layer")) == [0, 1, 2]


def test_vectors_with_nan_are_left_to_their_own_counter():
    bench = Bench()
    bench.change_keys = lambda key: key.index_fill(-1, torch.tensor([3]), torch.nan)
    bench.step(([1, 2], 0, 32))
    assert bench.monitor.num_samples == 0
    assert bench.counters.rows("cosine_by_layer") == {}
    assert bench.health == UNKNOWN


def test_drill_a_codebook_damaged_after_the_self_check(monkeypatch):
    """The tables the kernel reads are overwritten in memory: the next re-read tells."""
    bench = Bench()
    bench.step(([1, 2, 3], 0, 48))
    bench.step(([1, 2, 3], 48, 1))
    before = bench.cosine()
    assert bench.counters["monitor_changed"] == 0
    rows = next(
        t
        for t in cpu_tables.codec_struct(bench.codec).tables
        if t.shape == bench.codec.key.codebook.rows.shape
    )
    kept = rows.clone()
    try:
        with torch.inference_mode():  # a table made by an engine may be written in no other
            rows[:, 0] *= -1
        bench.step(([1, 2, 3], 49, 1))
    finally:
        with torch.inference_mode():
            rows.copy_(kept)
    assert bench.counters["monitor_changed"] == 1
    assert bench.health == DAMAGED
    assert bench.cosine() < before
    bench.step(([4, 5], 0, 32))
    assert bench.health == DAMAGED, "what was damaged once stays so until the next start"


def test_drill_a_page_overwritten_behind_our_back():
    bench = Bench()
    bench.step(([1, 2, 3], 0, 48))
    bench.caches[0][2, :, 5] ^= 0xFF
    bench.step(([1, 2, 3], 48, 1))
    assert bench.health == DAMAGED


@pytest.mark.parametrize(
    ("preset", "channel", "health"),
    [
        ("fibquant_4bit", 100.0, DEGRADED),
        ("fibquant_4bit", 2000.0, DAMAGED),
        ("fibquant_2bit", 52.0, DEGRADED),
        ("fibquant_2bit", 2000.0, DAMAGED),
    ],
)
def test_drill_keys_that_break_the_code(preset, channel, health):
    """Finite keys with a huge channel that attention does not feel: all that differs is lost."""
    bench = Bench(preset)
    for number in range(8):
        assert bench.health == UNKNOWN
        bench.step(([2 * number + 1, 2 * number + 2], 0, 32))
    assert bench.health == HEALTHY
    bench.change_keys = lambda key: 3 * key + channel * torch.eye(HEAD_DIM)[7]
    for number in range(40):
        bench.step(([2 * number % 30 + 1, 2 * number % 30 + 2], 0, 32))
    assert bench.health == health
    assert bench.counters["monitor_changed"] == 0
    assert bench.counters["monitor_worst_cosine"] < ledger.floor_cosine(bench.codec)


def test_a_cosine_that_is_no_number_is_damage():
    bench = Bench()
    for _ in range(ledger.LEAST):
        bench.ledger.compared(0, bench.codec, 1.0, float("nan"), 0.1)
    assert bench.health == DAMAGED and bench.counters["monitor_worst_cosine"] == 0.0


def test_the_budget_is_kept():
    bench = Bench(budget=0.01)
    requests = ([1, 2], 0, 32)
    for _ in range(300):
        bench.counters.last_attend = time.perf_counter() + 0.05  # a step of 50 ms, not waited for
        bench.ledger._step_began = time.perf_counter()
        bench.plan(
            np.array([0, 32], np.int32), np.array([32], np.int32), np.array([[1, 2]], np.int32),
            np.arange(16, 48),
        )  # fmt: skip
        bench.step(requests)
    spent, steps = bench.counters["monitor_seconds"], bench.counters["monitor_step_seconds"]
    samples = bench.counters.rows("cosine_by_layer")[0].count
    print(f"\n{samples} comparisons in 600 steps, {spent / steps:.2%} of {steps:.1f} s")
    assert samples > 0
    assert spent <= 0.012 * steps


def test_nothing_is_spent_before_it_has_been_earned():
    bench = Bench(budget=0.001)
    assert bench.step(([1, 2], 0, 32)) is None
