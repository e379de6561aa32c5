# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval`: measures what is missing, keeps every result at once, reports.

Each result is one line of a jsonl file, filed under what decides it (`Job.what`) and the code that
computed it (`code_digest`). A stopped run goes on where it was; a changed text, model, row or codec
is measured again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.evaluation.digests import code_digest, model_digest
from vllm_fibquant.evaluation.engine import UNCOMPRESSED, Engine, Shape
from vllm_fibquant.evaluation.measure import measure_fidelity, measure_spans, measure_text
from vllm_fibquant.evaluation.retrieval import retrieval_units
from vllm_fibquant.evaluation.rivals import KVQuant
from vllm_fibquant.evaluation.rows import EXACT_STEP, Row, all_rows
from vllm_fibquant.evaluation.simulate import Simulator
from vllm_fibquant.evaluation.texts import (
    CALIBRATION,
    EVALUATION,
    Sizes,
    Tokenizer,
    Unit,
    chunks_of,
    greedy_units,
    passkey_units,
    text_units,
)
from vllm_fibquant.evaluation.watch import AttentionWatch

NUM_STAGES = 4
TOGETHER = 4
"""Texts that an engine reads at the same time."""

ALL_KINDS = ("fidelity", "text", "passkey", "greedy", "retrieval")
SOURCES = ("prose", "code")
SIMULATED = "float32"
"""The dtype of the model in simulations; in another one they are left out."""


@dataclass(frozen=True)
class Job:
    """One unit of one row."""

    row: Row
    unit: Unit
    what: str


class Suite:
    """The plan for one model, and what of it has been measured.

    Attributes:
        rows: what is measured.
        dtype: of the model in the engine, of the uncompressed one too.
        results: by (row name, unit name), the lines of the file that belong to this plan.
        folder: holds what one run shares: what the uncompressed model makes of the units, and the
            calibration; the processes of a run are given one.
    """

    def __init__(
        self, model: str, sizes: Sizes, path: Path, *, rows: Sequence[Row] | None = None,
        quick: bool = False, any_code: bool = False, sources: Sequence[str] = SOURCES,
        kinds: Sequence[str] = ALL_KINDS, haystack: Path = EVALUATION, keys_in: Path = EVALUATION,
        folder: Path | None = None, dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.model, self.sizes, self.path, self.dtype = model, sizes, path, dtype
        self.shape = Shape.of(model)
        given = all_rows(sizes.step) if rows is None else list(rows)
        self.rows = [
            row for row in given if (row.quick or not quick) and (row.engine or dtype == SIMULATED)
        ]
        self._tokenizer = tokenizer = Tokenizer(model)
        self._calibration = chunks_of(
            CALIBRATION, tokenizer.encode, sizes.calibration, 1, tokenizer.begin
        )[0]
        self._base = repr((self._model_digest(), self._calibration, sizes.far))
        if dtype != SIMULATED:
            self._base += dtype
        units = list(self._units(kinds, sources, haystack, keys_in))
        self._early = [unit.name for unit in units if unit.kind == "text"][: sizes.num_other]
        self.jobs = [
            Job(row, unit, self._what(row, unit))
            for row in self.rows
            for unit in self._for(row, units)
        ]
        self._scratch = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = folder or Path(self._scratch.name)  # type: ignore[union-attr]
        self._loaded: Simulator | None = None
        self._any_code = any_code
        self.results: dict[tuple[str, str], dict[str, Any]] = {}
        self.read()

    def _model_digest(self) -> str:
        return model_digest(Path(self.model))

    def _units(
        self, kinds: Sequence[str], sources: Sequence[str], haystack: Path, keys_in: Path
    ) -> Iterator[Unit]:
        sizes, tokenizer = self.sizes, self._tokenizer
        texts = text_units(tokenizer, sources, sizes.chunk, sizes.num_chunks)
        start = texts[0].tokens[: sizes.fidelity]
        if "fidelity" in kinds:
            yield Unit("fidelity", f"fidelity:{texts[0].name}:{sizes.fidelity}", start)
        if "text" in kinds:
            yield from texts
        if "passkey" in kinds:
            yield from passkey_units(tokenizer, sizes, keys_in)
        if "greedy" in kinds:
            yield from greedy_units(tokenizer, sizes)
        if "retrieval" in kinds:
            lengths = [n for n in sizes.retrieval if n <= self.shape.num_positions]
            yield from retrieval_units(tokenizer, lengths, sizes.num_retrieval, haystack)

    def read(self) -> None:
        """Takes from the file what belongs to this plan."""
        wanted = {(job.row.name, job.unit.name): job for job in self.jobs}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            result = json.loads(line)
            key = result["row"], result["unit"]
            job = wanted.get(key)
            if job is None or job.what != result["what"]:
                continue
            if self._any_code or result["code"] == code_digest(job.row.is_calibrated):
                self.results[key] = result

    def _what(self, row: Row, unit: Unit) -> str:
        given = repr((self._base, row.identity, unit.digest))
        return hashlib.sha256(given.encode()).hexdigest()[:16]

    def _for(self, row: Row, units: list[Unit]) -> Iterator[Unit]:
        """The units that a row is measured on."""
        for unit in units:
            if unit.kind == "fidelity":
                if row.fidelity and row.engine is None:  # an engine's is read with its texts
                    yield unit
            elif row.group == "frontier":
                continue
            elif unit.kind == "text":
                if row.texts and (row.main or unit.name in self._early):
                    yield unit
            elif unit.kind == "retrieval":
                if row.retrieval:
                    yield unit
            elif row.main:
                yield unit

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if (job.row.name, job.unit.name) not in self.results]

    def prepare(self) -> None:
        """Lets the uncompressed model read what the missing results are compared with."""
        units = {job.unit.name: job.unit for job in self.missing}
        texts = [u for u in units.values() if u.kind == "text" and not self._states(u).exists()]
        prompts = [u for u in units.values() if u.kind == "greedy" and not self._states(u).exists()]
        if not texts and not prompts:
            return
        longest = max(
            [len(unit.tokens) for unit in texts]
            + [len(unit.tokens) + self.sizes.answer_length for unit in prompts]
        )
        engine = Engine(self.model, UNCOMPRESSED, {}, EXACT_STEP, longest, TOGETHER, self.dtype)
        try:
            for begin in range(0, len(texts), TOGETHER):
                some = texts[begin : begin + TOGETHER]
                states = engine.hidden([unit.tokens for unit in some])
                for unit, of_unit in zip(some, states, strict=True):
                    torch.save(of_unit, self._states(unit))
            answers = engine.continuations([u.tokens for u in prompts], self.sizes.answer_length)
            for unit, answer in zip(prompts, answers, strict=True):
                torch.save(torch.tensor(answer), self._states(unit))
        finally:
            engine.close()

    def _states(self, unit: Unit) -> Path:
        return self.folder / f"{unit.digest}.pt"

    def _asked(self, unit: Unit) -> Unit:
        """The unit as it is read: greedy prompts with the uncompressed model's continuation."""
        if unit.kind != "greedy":
            return unit
        return replace(unit, tokens=(*unit.tokens, *torch.load(self._states(unit)).tolist()))

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Measures what is missing, what matters most first, so that a stopped run is of use.

        Args:
            part, parts: of all rows, divided into `parts` about equal shares, share `part` alone.
        """
        from tqdm import tqdm

        jobs = self._share(self.missing, part, parts)
        total = sum(_weight(job) for job in jobs)
        print(f"eval: {len(jobs)} of {len(self.jobs)} results to measure here",
              file=sys.stderr, flush=True)  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(
            total=total, unit="tok", unit_scale=True, mininterval=5, smoothing=0, position=part
        ) as bar:
            for stage in range(NUM_STAGES):
                # Engines first: a large model should not be in memory twice.
                for row in sorted(self.rows, key=lambda row: row.engine is None):
                    mine = [job for job in jobs if job.row is row and self._stage(job) == stage]
                    if mine:
                        bar.set_description(row.name[:28].ljust(28))
                        self._run_row(row, mine, bar)

    def _share(self, jobs: list[Job], part: int, parts: int) -> list[Job]:
        """Whole rows, each given to the share that has least of its row's earliest stage."""
        totals = [[0] * NUM_STAGES for _ in range(parts)]
        mine: list[Job] = []
        for row in self.rows:
            of_row = [job for job in jobs if job.row is row]
            if not of_row:
                continue
            first = min(self._stage(job) for job in of_row)
            share = min(range(parts), key=lambda i: totals[i][first])
            for job in of_row:
                totals[share][self._stage(job)] += _weight(job)
            if share == part:
                mine += of_row
        return mine

    def _stage(self, job: Job) -> int:
        """Main rows on texts, their tasks, other rows, long retrieval.

        One engine serves a row within a stage.
        """
        if job.unit.kind == "retrieval":
            return 3
        if not job.row.main:
            return 0 if job.row.group == "check" else 2
        return 1 if job.unit.kind in ("passkey", "greedy") else 0

    def _run_row(self, row: Row, jobs: list[Job], bar: Any) -> None:
        if row.engine is None:
            self._run_simulated(row, jobs, bar)
        else:
            self._loaded = None
            gc.collect()
            self._run_engine(row, jobs, bar)

    def _run_simulated(self, row: Row, jobs: list[Job], bar: Any) -> None:
        simulator = self._loaded = self._loaded or Simulator(self.model)
        if isinstance(row.cache_format, KVQuant):
            layers = simulator.capture(tuple(self._calibration))
            row.cache_format.fit(layers, simulator.rotations)
        for job in jobs:
            begun = time.process_time()
            if job.unit.kind == "fidelity":
                metrics = measure_fidelity(simulator, job.unit, row.cache_format)
            else:
                unit = self._asked(job.unit)
                states = simulator.hidden(list(unit.tokens), row.cache_format)
                metrics = self._judge(simulator.logits, unit, states)
            self._keep(job, metrics, time.process_time() - begun)
            bar.update(_weight(job))

    def _run_engine(self, row: Row, jobs: list[Job], bar: Any) -> None:
        preset, options = row.engine or (UNCOMPRESSED, {})
        if row.is_calibrated:  # measured by the first such row of this run
            options = {"calibration": str(self.folder / "model.fqcal"), **options}
        is_long = jobs[0].unit.kind == "retrieval"
        step, together = (EXACT_STEP, 1) if is_long else (row.step, min(TOGETHER, len(jobs)))
        units = [self._asked(job.unit) for job in jobs]
        longest = max(len(unit.tokens) for unit in units)
        engine = Engine(self.model, preset, options, step, longest, together, self.dtype)
        try:
            for begin in range(0, len(jobs), together):
                begun = time.process_time()
                some, read = jobs[begin : begin + together], units[begin : begin + together]
                watch = AttentionWatch() if some[0].unit.kind == "text" else None
                states = engine.hidden([unit.tokens for unit in read], watch)
                spent = (time.process_time() - begun) / len(some)
                for job, unit, of_unit in zip(some, read, states, strict=True):
                    begun = time.process_time()
                    metrics = self._judge(engine.logits, unit, of_unit)
                    if watch is not None and job is some[0]:
                        metrics |= watch.summary()
                    self._keep(job, metrics, time.process_time() - begun + spent)
                    bar.update(_weight(job))
        finally:
            engine.close()

    def _judge(self, logits: Any, unit: Unit, states: torch.Tensor) -> dict[str, Any]:
        if unit.kind != "text":
            return measure_spans(logits, unit, states)
        truth = torch.load(self._states(unit))
        return measure_text(logits, unit.tokens, truth, states, self.sizes.far)

    def _keep(self, job: Job, metrics: dict[str, Any], seconds: float) -> None:
        result = {
            "model": Path(self.model).name, "row": job.row.name, "unit": job.unit.name,
            "kind": job.unit.kind, "via": "engine" if job.row.engine else "simulation",
            **metrics, "cpu_seconds": round(seconds, 1), "what": job.what,
            "code": code_digest(job.row.is_calibrated),
        }  # fmt: skip
        if self.dtype != SIMULATED:
            result["dtype"] = self.dtype
        if job.unit.depths:
            result["depths"] = job.unit.depths
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self.results[job.row.name, job.unit.name] = result

    def prune(self) -> None:
        """Rewrites the file with the newest result of each row and unit, in the rows' order; those
        of rows that are no more are left out."""
        order = {row.name: i for i, row in enumerate(all_rows(self.sizes.step))}
        order |= {row.name: i for i, row in enumerate(self.rows) if row.name not in order}
        newest = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            result = json.loads(line)
            if result["row"] in order:
                newest[result["row"], result["unit"]] = line
        lines = sorted(newest.items(), key=lambda item: order[item[0][0]])
        self.path.write_text("".join(line + "\n" for _, line in lines))

    def keep_shape(self) -> None:
        """Writes beside the results what tables over several models need of this one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        (self.path.parent / "model.json").write_text(json.dumps(asdict(self.shape)) + "\n")


def _weight(job: Job) -> int:
    """Tokens to be read, those of small engine steps counted by what they cost."""
    slow = 2 if job.row.engine and job.row.step < 64 and job.unit.kind != "retrieval" else 1
    return len(job.unit.tokens) * slow
