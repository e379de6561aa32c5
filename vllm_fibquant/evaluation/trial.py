# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval MODEL --row ...`: any presets and options on any texts, nothing else.

Everything is read through the engine, the uncompressed cache too, and compared at once; no
results are kept but those that are asked for with --json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.codec.config import is_fibquant
from vllm_fibquant.evaluation.engine import UNCOMPRESSED, Engine
from vllm_fibquant.evaluation.measure import measure_text, quantile_of_worst
from vllm_fibquant.evaluation.rows import EXACT_STEP
from vllm_fibquant.evaluation.texts import Sizes, Tokenizer, Unit, text_units
from vllm_fibquant.evaluation.watch import AttentionWatch
from vllm_fibquant.options import parse_options

TOGETHER = 4
"""Texts that are read at the same time."""


@dataclass(frozen=True)
class Trial:
    """A preset with its options, as in --kv-cache-dtype and --additional-config."""

    preset: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Trial:
        """`PRESET`, or `PRESET {"option": value, ...}`.

        Raises:
            ValueError: it is something else.
        """
        preset, _, rest = text.strip().partition(" ")
        try:
            options = json.loads(rest) if rest.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"eval: --row must be a preset and its options as JSON, got {text!r} ({error}); "
                """write for example --row 'fibquant_2bit {"mode": "quality"}'"""
            ) from error
        if is_fibquant(preset):
            parse_options(preset, {"fibquant": options})
        return cls(preset, options)

    def step(self, quality_step: int) -> int:
        """Tokens of a text prefilled at once: many where that changes nothing but the time."""
        if not is_fibquant(self.preset):
            return EXACT_STEP
        parsed = parse_options(self.preset, {"fibquant": self.options})
        return quality_step if parsed.prefill == "raw" else EXACT_STEP

    @property
    def is_calibrated(self) -> bool:
        """Whether the model's keys are measured first."""
        if not is_fibquant(self.preset):
            return False
        return parse_options(self.preset, {"fibquant": self.options}).calibrate != "none"

    def __str__(self) -> str:
        return f"{self.preset} {json.dumps(self.options)}" if self.options else self.preset


def read(
    model: str, trial: Trial, units: Sequence[Unit], step: int, dtype: str
) -> Iterator[tuple[Engine, list[torch.Tensor], dict[str, float]]]:
    """The engine, still open, what it made of the units' texts, in their order, and the cosines of
    its attention over the first of them."""
    longest = max(len(unit.tokens) for unit in units)
    engine = Engine(
        model, trial.preset, trial.options, trial.step(step), longest,
        min(TOGETHER, len(units)), dtype,
    )  # fmt: skip
    try:
        watch = AttentionWatch()
        states = engine.hidden([unit.tokens for unit in units], watch)
        yield engine, states, watch.summary()
    finally:
        engine.close()


def run_trials(
    model: str, trials: Sequence[Trial], sources: Sequence[str], length: int, num_chunks: int,
    step: int, dtype: str, far: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One result per trial and text, as soon as it is there.

    Args:
        sources: `prose`, `code` or files, see `texts.text_units`.
        length, num_chunks: tokens of a text, and texts of a source.
        step: tokens of a text prefilled at once in mode quality.
    """
    units = text_units(Tokenizer(model), sources, length, num_chunks)
    truths: list[torch.Tensor] = []
    for _, states, _ in read(model, Trial(UNCOMPRESSED, {}), units, EXACT_STEP, dtype):
        truths = states
    with tempfile.TemporaryDirectory() as folder:
        for trial in trials:
            # Measured once for all trials, unless the trial says where it is.
            options = dict(trial.options)
            if trial.is_calibrated:
                options.setdefault("calibration", str(Path(folder) / "model.fqcal"))
            begun, used = time.perf_counter(), time.process_time()
            asked = Trial(trial.preset, options)
            for engine, states, cosines in read(model, asked, units, step, dtype):
                took = time.perf_counter() - begun, time.process_time() - used
                for unit, truth, of_trial in zip(units, truths, states, strict=True):
                    metrics = measure_text(engine.logits, unit.tokens, truth, of_trial, far)
                    metrics |= cosines if unit is units[0] else {}
                    yield {
                        "model": Path(model).name, "row": str(trial), "unit": unit.name,
                        **metrics, "seconds": round(took[0], 1), "cpu_seconds": round(took[1], 1),
                    }  # fmt: skip


def run(model: Path, options: Any) -> int:
    """The command: prints a line per trial and text, and the means; returns the exit status."""
    trials = [Trial.parse(text) for text in options.row]
    length, chunks = options.tokens or 2048, options.chunks or 2
    results: list[dict[str, Any]] = []
    head = f"{'row':64} {'text':28} {'ΔPPL':>8} {'KL':>8} {'99.9 %':>8} {'same':>6}"
    print(f"{head} {'cosine':>7} {'worst':>7}", flush=True)
    try:
        for result in run_trials(
            str(model), trials, options.text, length, chunks, Sizes.step, options.dtype, length // 2
        ):
            results.append(result)
            _show(result["row"], result["unit"], [result])
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(result) + "\n")
    finally:
        for name in dict.fromkeys(result["row"] for result in results):
            mine = [result for result in results if result["row"] == name]
            _show(name, f"mean of {len(mine)}, {mine[0]['seconds']:.0f} s", mine)
    return 0


def _show(name: str, text: str, results: Sequence[dict[str, Any]]) -> None:
    increase = statistics.fmean(r["loss_increase"] for r in results)
    delta = torch.tensor(increase).expm1().item()
    kl = statistics.fmean(r["kl"] for r in results)
    same = statistics.fmean(r["same"] for r in results)
    seen = [r for r in results if "cosine" in r]
    cosines = f" {seen[0]['cosine']:7.4f} {seen[0]['worst_cosine']:7.4f}" if seen else ""
    print(
        f"{name:64} {text:28} {delta:8.2%} {kl:8.5f} {quantile_of_worst(results):8.4f} "
        f"{same:6.1%}{cosines}",
        file=sys.stdout, flush=True,
    )  # fmt: skip
