# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval`: measures what is missing, keeps every result at once, reports.

Each result is one line of a jsonl file, filed under what decides it (`Job.what`) and the code that
computed it (`code_digest`). A stopped run goes on where it was; a changed text, model, row or codec
is measured again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.evaluation.engine import Engine
from vllm_fibquant.evaluation.measure import measure_fidelity, measure_spans, measure_text
from vllm_fibquant.evaluation.rivals import KVQuant
from vllm_fibquant.evaluation.rows import Row, all_rows
from vllm_fibquant.evaluation.simulate import Simulator
from vllm_fibquant.evaluation.texts import (
    CALIBRATION,
    Sizes,
    Unit,
    chunks_of,
    greedy_units,
    passkey_units,
    text_units,
)
from vllm_fibquant.files import PACKAGE_DIR

# What the numbers follow from: modules, and folders with all their modules. Kernels and adapters
# are left out: tests and the self-check at start hold them to the oracle.
_DECIDING = ("codec", "files.py", "options.py", "ops/reference.py", "evaluation/formats.py",
             "evaluation/rivals.py", "evaluation/simulate.py", "evaluation/engine.py",
             "evaluation/measure.py")  # fmt: skip
_CALIBRATING = ("keys", "engine/calibrate.py", "engine/rotary.py")

NUM_STAGES = 4


@dataclass(frozen=True)
class Job:
    """One unit of one row."""

    row: Row
    unit: Unit
    what: str


@functools.cache
def code_digest(is_calibrated: bool) -> str:
    """Of the shipped codebooks, and of the modules that decide a row with a calibration or without.

    A module's statements count, each as a whole; its name, its place, imports, docstrings and the
    order of statements do not. So what moves from module to module leaves results current.
    """
    digest = hashlib.sha256()
    for statement in sorted(_statements(_DECIDING + (_CALIBRATING if is_calibrated else ()))):
        digest.update(statement.encode())
    for path in sorted((PACKAGE_DIR / "codebooks").glob("*.fqcb")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _statements(places: Iterable[str]) -> set[str]:
    """The top-level statements of modules, of all modules of folders, without imports and text."""
    found: set[str] = set()
    for place in places:
        path = PACKAGE_DIR / place
        for module in path.rglob("*.py") if path.is_dir() else (path,):
            tree = ast.parse(module.read_text())
            for node in ast.walk(tree):
                for name in ("body", "orelse", "finalbody"):
                    if isinstance(block := getattr(node, name, None), list):
                        setattr(node, name, [s for s in block if not _decides_nothing(s)])
            found.update(map(ast.dump, tree.body))
    return found


def _decides_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom)


def model_digest(folder: Path) -> str:
    """Of a model's configuration and weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Suite:
    """The plan for one model, and what of it has been measured.

    Attributes:
        rows: what is measured.
        continuations: the uncompressed model's, of the greedy prompts; they take a minute.
        results: by (row name, unit name), the lines of the file that belong to this plan.
    """

    def __init__(
        self, model: str, sizes: Sizes, path: Path, *, rows: Sequence[Row] | None = None,
        quick: bool = False, any_code: bool = False,
        continuations: list[list[int]] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.sizes, self.path = model, sizes, path
        self.simulator = Simulator(model)
        given = all_rows(sizes.step) if rows is None else list(rows)
        self.continuations = continuations
        self.rows = [row for row in given if row.quick or not quick]
        encode = functools.partial(self.simulator.tokenizer.encode, add_special_tokens=False)
        self._calibration = chunks_of(CALIBRATION, encode, sizes.calibration, 1)[0]
        prompts = functools.cache(lambda: greedy_units(encode, sizes, self._continue))
        units = text_units(encode, sizes) + list(passkey_units(encode, sizes)) + prompts()
        self._base = repr((model_digest(Path(model)), self._calibration, sizes.far))
        self.jobs = [
            Job(row, unit, self._what(row, unit))
            for row in self.rows
            for unit in self._for(row, units)
        ]
        self._truths: dict[str, torch.Tensor] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._calibration_path = str(Path(self._folder.name) / "model.fqcal")
        self._any_code = any_code
        self.results: dict[tuple[str, str], dict[str, Any]] = {}
        self.read()

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

    def _continue(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        if self.continuations is None:
            self.continuations = self.simulator.continuations(prompts, count)
        return self.continuations

    def _what(self, row: Row, unit: Unit) -> str:
        given = repr((self._base, row.identity, unit.digest))
        return hashlib.sha256(given.encode()).hexdigest()[:16]

    def _for(self, row: Row, units: list[Unit]) -> Iterator[Unit]:
        """The units that a row is measured on."""
        texts = 0
        for unit in units:
            if unit.kind == "fidelity":
                if row.fidelity:
                    yield unit
            elif row.group == "frontier":
                continue
            elif unit.kind == "text":
                texts += 1
                if row.main or texts <= self.sizes.num_other_chunks:
                    yield unit
            elif row.main:
                yield unit

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if (job.row.name, job.unit.name) not in self.results]

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
                for row in self.rows:
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
        """Main rows on the texts that all rows are measured on, their tasks, other rows, the rest.

        One engine serves a row within a stage.
        """
        texts = [other.unit.name for other in self.jobs if other.unit.kind == "text"]
        early = list(dict.fromkeys(texts))[: self.sizes.num_other_chunks]
        if not job.row.main:
            return 0 if job.row.group in ("check", "frontier") else 2
        if job.unit.kind in ("passkey", "greedy"):
            return 1
        return 0 if job.unit.kind == "fidelity" or job.unit.name in early else 3

    def _run_row(self, row: Row, jobs: list[Job], bar: Any) -> None:
        if isinstance(row.cache_format, KVQuant):
            layers = self.simulator.capture(tuple(self._calibration))
            row.cache_format.fit(layers, self.simulator.rotate)
        engine = None
        try:
            for job in jobs:
                begun = time.process_time()
                if job.unit.kind == "fidelity":
                    metrics = measure_fidelity(self.simulator, job.unit, row.cache_format)
                else:
                    if row.engine and engine is None:
                        preset, options = row.engine
                        if row.is_calibrated:  # measured by the first such row of this run
                            options = {**options, "calibration": self._calibration_path}
                        engine = Engine(self.model, preset, options, row.step, self.sizes.longest)
                    tokens = list(job.unit.tokens)
                    states = (
                        engine.hidden(tokens)
                        if engine
                        else self.simulator.hidden(tokens, row.cache_format)
                    )
                    metrics = self._judge(job.unit, states)
                self._keep(job, metrics, time.process_time() - begun)
                bar.update(_weight(job))
        finally:
            if engine:
                engine.close()

    def _judge(self, unit: Unit, states: torch.Tensor) -> dict[str, Any]:
        if unit.kind != "text":
            return measure_spans(self.simulator, unit, states)
        if unit.name not in self._truths:
            logits = self.simulator.logits(self.simulator.hidden(list(unit.tokens)))
            self._truths[unit.name] = logits.log_softmax(-1)
        return measure_text(self.simulator, unit, self._truths[unit.name], states, self.sizes.far)

    def _keep(self, job: Job, metrics: dict[str, Any], seconds: float) -> None:
        result = {
            "model": Path(self.model).name, "row": job.row.name, "unit": job.unit.name,
            "kind": job.unit.kind, "via": "engine" if job.row.engine and job.unit.kind != "fidelity"
            else "simulation", **metrics, "cpu_seconds": round(seconds, 1), "what": job.what,
            "code": code_digest(job.row.is_calibrated),
        }  # fmt: skip
        if job.unit.depths:
            result["depths"] = job.unit.depths
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self.results[job.row.name, job.unit.name] = result

    def prune(self) -> None:
        """Rewrites the file with this plan's results alone, in the plan's order."""
        keys = [(job.row.name, job.unit.name) for job in self.jobs]
        lines = [json.dumps(self.results[key]) for key in keys if key in self.results]
        self.path.write_text("".join(line + "\n" for line in lines))


def _weight(job: Job) -> int:
    """Tokens to be read, those of small engine steps counted by what they cost."""
    slow = 3 if job.row.engine and job.row.step < 64 else 1
    return len(job.unit.tokens) * (1 if job.unit.kind == "fidelity" else slow)
