# SPDX-License-Identifier: Apache-2.0
"""Fidelity while serving: attention over codes against attention over exact keys and values.

A sample is a run of prompt tokens of one request. Of one layer and one KV head their exact keys and
values are kept in 16 bits, together with the query of the step's last token in that request. The
served kernel attends that query to the sample's codes in the pages, and its output is compared with
attention over the exact keys and values: cosine and relative error. Later, while some request still
reads the sample's tokens, it is compared again with that request's newest query (does fidelity
change as tokens age?), and the first query is asked again: codes never change and the kernel is
deterministic, so its output must be the same to the bit. If not, a page, a codebook or a rotation
has been damaged.

A sample ends when one of its slots is written again. What the step itself writes is told by its
slot mapping before any layer runs, so a sample is never compared with tokens that follow it there.

The monitor reads pages and writes none, and never changes what a step returns. Its own time,
bookkeeping included, is held below a share of the time of steps: a step is sampled only when what
has been saved pays for it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.observe.ledger import Ledger, exact_attention
from vllm_fibquant.ops import Attend, Batch, Pages
from vllm_fibquant.options import MonitorOptions

MIN_TOKENS, MAX_TOKENS = 16, 64
"""Tokens of a sample. Softmax over very few says little."""

SAVED = 4
"""Comparisons whose time is kept for new samples."""

Ints = npt.NDArray[np.int64]


class Layer(Protocol):
    """What the monitor needs to know of an attention layer."""

    codec: KVCodec
    attend: Attend
    num_heads: int
    num_kv_heads: int

    def pages(self, kv_cache: torch.Tensor) -> Pages: ...


def _empty() -> torch.Tensor:
    return torch.empty(0)


@dataclass(eq=False)
class Exact:
    """Exact keys and values of a run of tokens of one request, in one layer and KV head.

    Attributes:
        layer: index into the monitor's layers.
        head: the KV head.
        key, value: 16-bit [tokens, head_dim]; all four are empty until the layer has run.
        query: [1, num_q_heads, head_dim], the query the sample was taken with.
        output: as query, what the pages gave for it.
    """

    layer: int
    head: int
    key: torch.Tensor = field(init=False, default_factory=_empty)
    value: torch.Tensor = field(init=False, default_factory=_empty)
    query: torch.Tensor = field(init=False, default_factory=_empty)
    output: torch.Tensor = field(init=False, default_factory=_empty)

    def keep(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copies of all three, keys and values in 16 bits."""
        dtype = torch.bfloat16 if key.dtype == torch.float32 else key.dtype
        self.key, self.value = key.to(dtype, copy=True), value.to(dtype, copy=True)
        self.query = query.clone()

    def outputs(
        self, layer: Layer, query: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the query heads that read the KV head, float32 [group_size, head_dim]: what the pages
        gave, and attention over the exact keys and values."""
        group_size = layer.num_heads // layer.num_kv_heads
        heads = slice(self.head * group_size, (self.head + 1) * group_size)
        scale, soft_cap = layer.attend.scale, layer.attend.soft_cap
        exact = exact_attention(query[0, heads], self.key, self.value, scale, soft_cap)
        return output[0, heads].float(), exact


def attend_codes(
    layer: Layer, query: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, length: int
) -> torch.Tensor:
    """What the served kernel makes of a sample's codes: as query.

    The query stands at the sample's last token, the batch's last one, in a window of the sample's
    length: it sees the sample's tokens, at their own positions, and nothing else.
    """
    out = torch.empty_like(query)
    attend = Attend(layer.attend.scale, window=length, soft_cap=layer.attend.soft_cap)
    ops.paged_attention(query, out, layer.pages(kv_cache), batch, attend)
    return out


@dataclass(eq=False)
class Sample(Exact):
    """A sample of the CPU's monitor.

    Attributes:
        begin, end: positions in the request.
        slots: int64 [end - begin].
        table: int32 [1, blocks up to end], of which only those that hold the tokens mean something.
        written: monotonic time.
    """

    begin: int
    end: int
    slots: Ints
    table: torch.Tensor
    written: float


@dataclass(frozen=True)
class Probe:
    """One comparison planned for a step.

    Attributes:
        sample: to be taken if `first_row` is given, else to be compared again.
        query_row: row of the step's batch whose query is asked.
        first_row: row of the sample's first token.
    """

    monitor: Monitor
    sample: Sample
    query_row: int
    first_row: int | None

    def run(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """To be called by every layer once the step's codes are written; one of them compares."""
        monitor = self.monitor
        if monitor.layers[self.sample.layer] is not layer:
            return
        began = time.perf_counter()
        sample, asked = self.sample, query[self.query_row : self.query_row + 1]
        if self.first_row is None:
            monitor.compare_again(sample, asked, kv_cache)
        else:
            rows = slice(self.first_row, self.first_row + len(sample.slots))
            monitor.take(sample, asked, key[rows, sample.head], value[rows, sample.head], kv_cache)
        monitor.ledger.spend(time.perf_counter() - began, is_comparison=True)


class Monitor:
    """The samples of one group of layers, which share block tables and so slots.

    Args:
        options: of the run.
        layers: the group's layers.
        numbers: their numbers in the model, which label what is found.
        block_size: tokens of a block.
        ledger: shared by the monitors of a process.
    """

    def __init__(
        self,
        options: MonitorOptions,
        layers: list[Any],
        numbers: list[int],
        block_size: int,
        ledger: Ledger,
    ) -> None:
        self.layers: list[Layer] = layers
        self.ledger = ledger
        self._numbers = numbers
        self._block_size = block_size
        self._max_samples = max(1, options.tokens // MAX_TOKENS)
        self._samples: list[Sample] = []
        self._sample_of_slot: dict[int, Sample] = {}
        # A slot that no sample holds costs an array look-up; grows to the highest slot seen.
        self._is_held = np.zeros(0, np.bool_)
        self._random = np.random.default_rng(0)
        self._turn = 0

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def plan(
        self,
        query_start_loc: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        slot_mapping: Ints,
    ) -> Probe | None:
        """To be called for every step before its layers run.

        Args:
            query_start_loc: [num_reqs + 1].
            seq_lens: [num_reqs], new tokens included.
            block_table: [num_reqs, max_blocks].
            slot_mapping: [num_tokens] of the new tokens; -1 is stored nowhere.

        Returns:
            The comparison of this step, or None.
        """
        began = time.perf_counter()
        self.ledger.begin_step(began)
        slots = slot_mapping[: query_start_loc[-1]]
        # First of all: what is planned below must not rest on tokens that this step replaces.
        self._drop_written(slots)
        batch, probe = (query_start_loc, seq_lens, block_table), None
        if self.ledger.can_afford():
            probe = self._plan_new(*batch, slots)
        # Prompts are rarer than other steps: what they may cost is not spent on old samples.
        if probe is None and self.ledger.can_afford(1 + SAVED):
            probe = self._plan_again(*batch)
        self.ledger.spend(time.perf_counter() - began)
        return probe

    def take(
        self,
        sample: Sample,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """Fills a planned sample and compares it for the first time.

        Args:
            query: [1, num_q_heads, head_dim].
            key, value: [tokens, head_dim], of the sample's KV head.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes].
        """
        if not (torch.isfinite(key).all() and torch.isfinite(value).all()):
            self._drop(sample)  # stored as zero vectors and counted; nothing to compare
            return
        sample.keep(query, key, value)
        sample.output = self._read_pages(sample, query, kv_cache)
        self._compare(sample, query, sample.output)

    def compare_again(self, sample: Sample, query: torch.Tensor, kv_cache: torch.Tensor) -> None:
        """Compares a sample with a new query, and reads it again with its first one."""
        self._compare(sample, query, self._read_pages(sample, query, kv_cache))
        is_same = torch.equal(self._read_pages(sample, sample.query, kv_cache), sample.output)
        self.ledger.reread(is_same)
        if not is_same:
            self._drop(sample)

    def _read_pages(
        self, sample: Sample, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        batch = Batch(bounds, torch.tensor([sample.end], dtype=torch.int32), sample.table)
        layer, length = self.layers[sample.layer], sample.end - sample.begin
        return attend_codes(layer, query, kv_cache, batch, length)

    def _compare(self, sample: Sample, query: torch.Tensor, output: torch.Tensor) -> None:
        layer = self.layers[sample.layer]
        found, exact = sample.outputs(layer, query, output)
        size = float(exact.norm())
        if not size > 0:
            return
        cosine = float(torch.cosine_similarity(found, exact, dim=-1).mean())
        error = float((found - exact).norm()) / size
        age = time.monotonic() - sample.written
        self.ledger.compared(self._numbers[sample.layer], layer.codec, age, cosine, error)

    def _plan_new(
        self,
        query_start_loc: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        slots: Ints,
    ) -> Probe | None:
        """A sample among the new tokens of a request that has enough of them."""
        query_lens = np.diff(query_start_loc)
        long = np.flatnonzero(query_lens >= MIN_TOKENS)
        if not len(long):
            return None
        req = int(self._random.choice(long))
        length = min(MAX_TOKENS, int(query_lens[req]))
        # Its own last token's query is asked; a window layer would not see tokens far before it.
        number = self._turn % len(self.layers)
        layer = self.layers[number]
        window, num_new = layer.attend.window, int(query_lens[req])
        reach = min(num_new, window) if window else num_new
        if reach < MIN_TOKENS:
            return None
        length = min(length, reach)
        last_row = int(query_start_loc[req + 1]) - 1
        first_row = last_row + 1 - int(self._random.integers(length, reach + 1))
        chosen = slots[first_row : first_row + length]
        num_writes = np.isin(slots, chosen).sum()
        if (chosen < 0).any() or not num_writes == length == len(np.unique(chosen)):
            return None  # not stored, or written twice in this step
        end = int(seq_lens[req]) - (last_row + 1 - first_row) + length
        num_blocks = -(-end // self._block_size)
        if num_blocks > block_table.shape[1]:
            return None
        sample = Sample(
            number,
            int(self._random.integers(layer.num_kv_heads)),
            end - length,
            end,
            chosen.copy(),
            torch.from_numpy(block_table[req : req + 1, :num_blocks].astype(np.int32)),
            time.monotonic(),
        )
        if len(self._samples) >= self._max_samples:
            # Any one of them: some samples grow old, most are young.
            self._drop(self._samples[int(self._random.integers(len(self._samples)))])
        self._turn += 1
        self._samples.append(sample)
        self._sample_of_slot.update(dict.fromkeys(sample.slots.tolist(), sample))
        self._is_held[sample.slots] = True
        self.ledger.counters["monitor_tokens"] += length
        return Probe(self, sample, last_row, first_row)

    def _plan_again(
        self,
        query_start_loc: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
    ) -> Probe | None:
        """The next sample whose tokens a request of this step reads."""
        query_lens = np.diff(query_start_loc)
        context = seq_lens - query_lens
        for _ in range(len(self._samples)):
            sample = self._samples.pop(0)
            self._samples.append(sample)
            first, last = sample.begin // self._block_size, -(-sample.end // self._block_size)
            if last > block_table.shape[1] or not len(sample.query):
                continue
            held = sample.table[0, first:last].numpy()
            reads = (block_table[:, first:last] == held).all(-1)
            reads &= (query_lens > 0) & (context >= sample.end)
            layer = self.layers[sample.layer]
            if layer.attend.window:
                reads &= sample.begin > seq_lens - 1 - layer.attend.window
            readers = np.flatnonzero(reads)
            if len(readers):
                return Probe(self, sample, int(query_start_loc[readers[0] + 1]) - 1, None)
        return None

    def _drop_written(self, slots: Ints) -> None:
        highest = int(slots.max(initial=-1))
        if highest >= len(self._is_held):
            grown = np.zeros(max(highest + 1, 2 * len(self._is_held)), np.bool_)
            grown[: len(self._is_held)] = self._is_held
            self._is_held = grown
        written = slots[slots >= 0]
        for slot in written[self._is_held[written]].tolist():
            if slot in self._sample_of_slot:
                self._drop(self._sample_of_slot[slot])

    def _drop(self, sample: Sample) -> None:
        self._samples.remove(sample)
        self._is_held[sample.slots] = False
        for slot in sample.slots.tolist():
            del self._sample_of_slot[slot]
        self.ledger.counters["monitor_tokens"] -= len(sample.slots)


def monitor_of(
    owner: object,
    layers: dict[str, Any],
    block_size: int,
    is_loss_accepted: bool = False,
    make: Callable[..., Any] = Monitor,
) -> Any:
    """The monitor of a group of layers, or None when it is off.

    Args:
        owner: the run; the monitors of one run have one ledger.
        layers: the group's layers by name, with their options.
        block_size: tokens of a block.
        is_loss_accepted: as of `ledger.Ledger`.
        make: what makes it of the arguments of `Monitor`.
    """
    global _latest
    options = next(iter(layers.values())).options.monitor if layers else None
    if options is None:
        return None
    if _latest is None or _latest[0] is not owner:
        _latest = owner, Ledger(options.budget, own_counters(), is_loss_accepted)
    numbers = [int(n[0]) if (n := re.findall(r"\d+", name)) else 0 for name in layers]
    return make(options, list(layers.values()), numbers, block_size, _latest[1])


_latest: tuple[object, Ledger] | None = None
