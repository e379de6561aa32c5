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

A GPU the host never waits for: it knows the bounds of a step alone. So a sample's blocks, its end
and whether it is still as it was written are tensors on the device of the pages. Every step notes
there which samples are written again; a comparison writes its numbers to the device, and the host
reads them in a later step, once they have arrived. A step that may be replayed from a captured CUDA
graph runs no Python between its layers. Those are steps of few new tokens each request, so on a GPU
comparisons are made in the others: in steps that hold a part of a prompt.

On a CPU numbers are there at once: every step may compare, a sample is read again only where a
request of the step reads it, and one that was written over is dropped in the same step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_fibquant.observe.ledger import Ledger
from vllm_fibquant.observe.sample import Layer, Sample, attend_codes
from vllm_fibquant.ops import Batch
from vllm_fibquant.options import MonitorOptions

MIN_TOKENS, MAX_TOKENS = 16, 64
"""Tokens of a sample. Softmax over very few says little."""

SAVED = 4
"""Comparisons whose time is kept for new samples: prompts are rarer than other steps."""

TRIED = 8
"""Samples of which a CPU looks, each step, whether a request reads them; the next step goes on."""

MAX_STEP_S = 0.25
"""A GPU's step lasts from its planning to the next one's: of more, the engine was idle."""

_NO_SLOT = -2
"""In the place of a slot; -1 is one that stores nothing."""


class Step(NamedTuple):
    """The batch of a step: query_start_loc, seq_lens and block_table as `ops.Batch`, slots as the
    slot_mapping of its new tokens, all on the device; and the seq_lens of requests with more new
    tokens than drafts have, as the host knows them, or None."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    host_lens: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Probe:
    """One comparison planned for a step.

    Attributes:
        first_row, last_row: of the step's new tokens, where the sample begins and whose query is
            asked; None for a sample that is compared again.
    """

    monitor: Monitor
    sample: Sample
    step: Step
    first_row: int | None = None
    last_row: int | None = None

    def run(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """To be called by every layer once the step's codes are written; one of them compares."""
        monitor, sample = self.monitor, self.sample
        if monitor.layers[sample.layer] is not layer:
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        clock = _Clock(query.device)
        if self.first_row is None or self.last_row is None:
            found = monitor.compare_again(sample, self.step, query, kv_cache)
        else:
            rows = slice(self.first_row, self.first_row + sample.length)
            asked = query[self.last_row : self.last_row + 1]
            new_key, new_value = (x[rows, sample.head] for x in (key, value))
            found = monitor.take(sample, asked, new_key, new_value, kv_cache)
        monitor.send(sample, found, clock, is_new=self.first_row is not None)


class _Clock:
    """The time of what is launched between its making and `stop`, by the device's own events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._began = device.type == "cuda", time.perf_counter()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * self._on_gpu)]
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        self._host_s = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    @property
    def has_stopped(self) -> bool:
        return not self._events or self._events[1].query()

    @property
    def seconds(self) -> float:
        """Of the host or of the device, whichever took longer."""
        if not self._events:
            return self._host_s
        return max(self._host_s, self._events[0].elapsed_time(self._events[1]) / 1e3)


class _Sent(NamedTuple):
    """Numbers of a comparison under way to the host."""

    sample: Sample
    numbers: torch.Tensor
    clock: _Clock
    is_new: bool


class Monitor:
    """The samples of one group of layers, which share block tables and so slots.

    Args:
        options: of the run.
        layers: the group's layers.
        numbers: their numbers in the model, which label what is found.
        block_size: tokens of a block.
        ledger: shared by the monitors of a process.
        device: of pages and steps.
        waits: whether the host may look at tensors of the device at once, as on CPUs.
        num_speculative: tokens that are proposed for each request of a decode step, which may be
            replayed from a graph.
    """

    def __init__(
        self,
        options: MonitorOptions,
        layers: list[Any],
        numbers: list[int],
        block_size: int,
        ledger: Ledger,
        device: torch.device,
        waits: bool,
        num_speculative: int = 0,
    ) -> None:
        self.layers: list[Layer] = layers
        self.ledger, self._waits = ledger, waits
        # New tokens of a request in a step that compares: fewer may be a captured graph's.
        self._fewest_tokens = 0 if waits else max(MIN_TOKENS, num_speculative + 2)
        self._numbers, self._block_size = numbers, block_size
        num_places = max(1, options.tokens // MAX_TOKENS)
        self._samples: list[Sample] = []
        self._free = list(range(num_places))
        # Slots of each place's sample, and whether they hold what was written then.
        self._slots = torch.full((num_places, MAX_TOKENS), _NO_SLOT, device=device)
        self._holds = torch.zeros(num_places, dtype=torch.bool, device=device)
        # The same slots where the host may look: most steps write none of them.
        self._held: set[int] = set()
        self._bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
        self._sent: list[_Sent] = []
        self._random = np.random.default_rng(0)
        self._turn = 0

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def plan(self, starts: npt.NDArray[np.int32], step: Step) -> Probe | None:
        """To be called for every step before its layers run, and outside of captured graphs.

        Args:
            starts: the step's query_start_loc, on the host.
            step: the same batch on the device; slots of padding may follow the others.

        Returns:
            The comparison of this step, or None.
        """
        began = time.perf_counter()
        self.ledger.begin_step(began, None if self._waits else MAX_STEP_S)
        self._receive()
        step = step._replace(slots=step.slots[: starts[-1]])
        # First of all: what is planned below must not rest on tokens that this step replaces.
        self._note_written(step.slots)
        query_lens, probe = np.diff(starts), None
        if (longest := query_lens.max(initial=0)) >= self._fewest_tokens:
            if longest >= MIN_TOKENS and self.ledger.can_afford():
                probe = self._plan_new(starts, query_lens, step)
            if probe is None and self.ledger.can_afford(1 + SAVED):
                probe = self._plan_again(step)
        self.ledger.spend(time.perf_counter() - began)
        return probe

    def take(
        self,
        sample: Sample,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> torch.Tensor:
        """Fills a planned sample and compares it for the first time.

        Args:
            query: [1, num_q_heads, head_dim].
            key, value: [tokens, head_dim], of the sample's KV head.
            kv_cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes].

        Returns:
            As `_compare`.
        """
        is_finite = torch.isfinite(key).all() & torch.isfinite(value).all()
        self._holds[sample.place] &= is_finite  # else zeros are stored, and counted elsewhere
        sample.keep(query, key, value)
        sample.output = self._read_pages(sample, query, kv_cache)
        holds = self._holds[sample.place]
        return self._compare(sample, query, sample.output, holds, torch.ones_like(holds))

    def compare_again(
        self, sample: Sample, step: Step, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """Compares a sample with the newest query of a request that reads it, and reads it again
        with its first one. Returns as `_compare`."""
        reads = self._readers(sample, step)
        row = step.query_start_loc[1:].index_select(0, reads.int().argmax().view(1)) - 1
        asked = query.index_select(0, row.clamp_min(0))
        same = (self._read_pages(sample, sample.query, kv_cache) == sample.output).all()
        output = self._read_pages(sample, asked, kv_cache)
        return self._compare(sample, asked, output, self._holds[sample.place] & reads.any(), same)

    def send(self, sample: Sample, found: torch.Tensor, clock: _Clock, is_new: bool) -> None:
        """Lets what a comparison found go to the host, which looks at it in a later step, on a CPU
        now."""
        on_gpu = found.device.type == "cuda"
        numbers = torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=on_gpu)
        numbers.copy_(found, non_blocking=True)
        clock.stop()
        self._sent.append(_Sent(sample, numbers, clock, is_new))
        if self._waits:
            self._receive()

    def _receive(self) -> None:
        """Takes note of what has arrived."""
        while self._sent and self._sent[0].clock.has_stopped:
            sample, numbers, clock, is_new = self._sent.pop(0)
            self.ledger.spend(clock.seconds, is_comparison=True)
            cosine, error, is_valid, is_same, holds = numbers.tolist()
            if is_valid:
                age = time.monotonic() - sample.written if not is_new else 0.0
                codec = self.layers[sample.layer].codec
                self.ledger.compared(self._numbers[sample.layer], codec, age, cosine, error)
                if not is_new:
                    self.ledger.reread(bool(is_same))
            if sample in self._samples and (not holds or (is_valid and not is_same)):
                self._drop(sample)

    def _read_pages(
        self, sample: Sample, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        batch = Batch(self._bounds, sample.end, sample.table)
        return attend_codes(self.layers[sample.layer], query, kv_cache, batch, sample.length)

    def _compare(
        self,
        sample: Sample,
        query: torch.Tensor,
        output: torch.Tensor,
        is_valid: torch.Tensor,
        is_same: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [5]: cosine, relative error, whether they mean something, whether a second
        reading gave the first one's bits, and whether the sample is as it was written."""
        found, exact = sample.outputs(self.layers[sample.layer], query, output)
        size = exact.norm()
        cosine = torch.cosine_similarity(found, exact, dim=-1).mean()
        error = (found - exact).norm() / size
        flags = is_valid & (size > 0), is_same, self._holds[sample.place]
        return torch.stack((cosine, error, *(flag.float() for flag in flags)))

    def _readers(self, sample: Sample, step: Step) -> torch.Tensor:
        """bool [requests]: those that read the sample's tokens, and have new ones."""
        num_reqs, size = step.seq_lens.shape[0], self._block_size
        number = torch.arange(sample.table.shape[1], device=sample.end.device)
        begin = sample.end - sample.length
        outside = (number < begin // size) | (number >= (sample.end + size - 1) // size)
        reads = ((step.block_table[:num_reqs] == sample.table) | outside).all(-1)
        query_lens = step.query_start_loc.diff()[:num_reqs]
        reads &= (query_lens > 0) & (step.seq_lens - query_lens >= sample.end)
        if window := self.layers[sample.layer].attend.window:
            reads &= begin > step.seq_lens - 1 - window
        if chunk := self.layers[sample.layer].attend.chunk:
            reads &= begin // chunk == (step.seq_lens - 1) // chunk
        return reads

    def _plan_new(
        self, starts: npt.NDArray[np.int32], query_lens: npt.NDArray[np.int32], step: Step
    ) -> Probe | None:
        """A sample among the new tokens of a request that has enough of them."""
        req = int(self._random.choice(np.flatnonzero(query_lens >= MIN_TOKENS)))
        number, num_new = self._turn % len(self.layers), int(query_lens[req])
        layer = self.layers[number]
        # Its own last token's query is asked; a window layer would not see tokens far before it.
        window, chunk = layer.attend.window, layer.attend.chunk
        reach = min(num_new, window) if window else num_new
        if chunk:  # of which its last token sees a part; without lengths on the host no sample
            seen = 0 if step.host_lens is None else (int(step.host_lens[req]) - 1) % chunk + 1
            reach = min(num_new, seen)
        if reach < MIN_TOKENS:
            return None
        length = min(MAX_TOKENS, reach)
        last_row = int(starts[req + 1]) - 1
        first_row = last_row + 1 - int(self._random.integers(length, reach + 1))
        if not self._free:
            # Any one of them: some samples grow old, most are young.
            self._drop(self._samples[int(self._random.integers(len(self._samples)))])
        place = self._free.pop()
        chosen = step.slots[first_row : first_row + length]
        self._slots[place].fill_(_NO_SLOT)
        self._slots[place, :length] = chosen
        # Not where a token is not stored, or its slot is written twice in this step.
        num_writes = (step.slots[:, None] == chosen).sum()
        self._holds[place] = (chosen >= 0).all() & (num_writes == length)
        sample = Sample(
            number,
            int(self._random.integers(layer.num_kv_heads)),
            length,
            place,
            step.seq_lens[req : req + 1] - (last_row + 1 - first_row) + length,
            step.block_table[req : req + 1].clone(),
            time.monotonic(),
        )
        self._turn += 1
        self._samples.append(sample)
        if self._waits:
            self._held.update(chosen.tolist())
        self.ledger.counters["monitor_tokens"] += length
        return Probe(self, sample, step, first_row, last_row)

    def _plan_again(self, step: Step) -> Probe | None:
        """The next sample, which a request of this step reads: a GPU finds that itself."""
        for _ in range(min(TRIED, len(self._samples))):
            sample = self._samples.pop(0)
            self._samples.append(sample)
            if len(sample.query) == 0 or sample.table.shape[1] != step.block_table.shape[1]:
                continue
            if not self._waits or self._readers(sample, step).any():
                return Probe(self, sample, step)
        return None

    def _note_written(self, slots: torch.Tensor) -> None:
        if not self._samples or not len(slots):
            return
        if self._waits and self._held.isdisjoint(slots.tolist()):
            return
        ordered = slots.sort().values
        at = torch.searchsorted(ordered, self._slots).clamp_max_(len(ordered) - 1)
        self._holds &= (ordered[at] != self._slots).all(-1)
        if self._waits:
            holds = self._holds.tolist()
            for sample in [sample for sample in self._samples if not holds[sample.place]]:
                self._drop(sample)

    def _drop(self, sample: Sample) -> None:
        self._samples.remove(sample)
        if self._waits:
            self._held.difference_update(self._slots[sample.place].tolist())
        self._free.append(sample.place)
        self.ledger.counters["monitor_tokens"] -= sample.length
