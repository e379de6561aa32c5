# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval MODEL --row ...`: any presets and options on any texts, nothing else.

A suite of these rows and texts alone, all read through the engine, the uncompressed cache too; no
results are kept but those that are asked for with --json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.formats import Format
from vllm_fibquant.evaluation.report import shown, summarise
from vllm_fibquant.evaluation.rows import EXACT_STEP, Row
from vllm_fibquant.evaluation.suite import Job, Suite
from vllm_fibquant.evaluation.texts import Sizes
from vllm_fibquant.options import parse_options

COLUMNS = (("ΔPPL", "delta", ".2%"), ("KL", "kl", ".5f"), ("99.9 %", "kl_worst", ".4f"),
           ("same", "same", ".1%"), ("cosine", "cosine", ".4f"),
           ("worst", "worst_cosine", ".4f"))  # fmt: skip
"""Heading, name among a summary's numbers, and format."""

Result = dict[str, Any]


def parse_row(text: str) -> Row:
    """`PRESET`, or `PRESET {"option": value, ...}`, as in --kv-cache-dtype and --additional-config.

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
    step = EXACT_STEP
    if (
        preset.startswith("fibquant")
        and parse_options(preset, {"fibquant": options}).prefill == "raw"
    ):
        step = Sizes.step
    name = f"{preset} {json.dumps(options)}" if options else preset
    return Row(name, "quality", Format(), (preset, options), step, main=True)


class _Trial(Suite):
    """A suite that shows each result as soon as it is there."""

    show: Callable[[Result], None]

    def _keep(self, job: Job, metrics: Result, seconds: float) -> None:
        super()._keep(job, metrics, seconds)
        self.show(self.results[job.row.name, job.unit.name])


def measure_rows(
    model: str, rows: Sequence[Row], sources: Sequence[str], length: int, num_chunks: int,
    dtype: str = "float32", show: Callable[[Result], None] = lambda result: None,
) -> list[Result]:  # fmt: skip
    """One result per row and text.

    Args:
        sources: `prose`, `code` or files, see `texts.text_units`.
        length, num_chunks: tokens of a text, and texts of a source.
        dtype: of the model.
        show: called with each result.
    """
    sizes = Sizes(
        chunk=length, num_chunks=num_chunks, far=length // 2, calibration=min(length, 2048)
    )
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(
            model, sizes, Path(folder) / "results.jsonl", rows=rows, sources=sources,
            kinds=("text",), folder=Path(folder), dtype=dtype,
        )  # fmt: skip
        trial.show = show
        trial.prepare()
        trial.run()
    return list(trial.results.values())


def run(model: Path, options: Any) -> int:
    """The command: prints a line per row and text, and the means; returns the exit status."""
    rows = {row.name: row for row in map(parse_row, options.row)}
    results: list[Result] = []
    heads = "".join(f" {head:>8}" for head, *_ in COLUMNS)
    print(f"{'row':64} {'text':28}{heads}", flush=True)

    def line(name: str, text: str, some: Sequence[Result]) -> None:
        numbers = summarise(rows[name], 1, some).numbers
        cells = "".join(f" {shown(numbers.get(key), form):>8}" for _, key, form in COLUMNS)
        print(f"{name:64} {text:28}{cells}", flush=True)

    def show(result: Result) -> None:
        results.append(result)
        line(result["row"], result["unit"], [result])
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(result) + "\n")

    try:
        measure_rows(
            str(model), list(rows.values()), options.text, options.tokens or 2048,
            options.chunks or 2, options.dtype, show,
        )  # fmt: skip
    finally:
        for name in dict.fromkeys(result["row"] for result in results):
            mine = [result for result in results if result["row"] == name]
            seconds = sum(result["cpu_seconds"] for result in mine)
            line(name, f"mean of {len(mine)}, {seconds:.0f} CPU s", mine)
    return 0
