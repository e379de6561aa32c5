# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant eval MODEL --row ...`: any presets and options on any texts, or on pass keys.

A suite of these rows and texts alone, all read through the engine, the uncompressed cache too; no
results are kept but those that are asked for with --json.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.evaluation.formats import Format
from vllm_fibquant.evaluation.report import shown, summarise
from vllm_fibquant.evaluation.rows import EXACT_STEP, Row
from vllm_fibquant.evaluation.suite import Job, Suite
from vllm_fibquant.evaluation.texts import EVALUATION, Sizes, spread_keys
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
    if not preset.startswith("fibquant"):
        _check_stock(preset)
    elif parse_options(preset, {"fibquant": options}).prefill == "raw":
        step = Sizes.step
    name = f"{preset} {json.dumps(options)}" if options else preset
    return Row(name, "quality", Format(), (preset, options), step, main=True)


def _check_stock(name: str) -> None:
    """Refuses what is no cache dtype of vLLM's, before any model is loaded."""
    from vllm_fibquant.engine.compat import stock_cache_dtypes

    known = [known for known in stock_cache_dtypes() if known not in PRESETS]
    if name not in known:
        raise ValueError(
            f"eval: --row must begin with one of our presets or with a --kv-cache-dtype of vLLM's, "
            f"got {name!r}; presets are {', '.join(PRESETS)}, and vLLM's are {', '.join(known)}"
        )


class _Trial(Suite):
    """A suite that shows each result as soon as it is there."""

    show: Callable[[Result], None]

    def _model_digest(self) -> str:
        """None: results are not kept, and weights of gigabytes need not be read for it."""
        return ""

    def _keep(self, job: Job, metrics: Result, seconds: float) -> None:
        super()._keep(job, metrics, seconds)
        self.show(self.results[job.row.name, job.unit.name])


def measure_rows(
    model: str, rows: Sequence[Row], sources: Sequence[str], length: int, num_chunks: int,
    dtype: str = "float32", show: Callable[[Result], None] = lambda result: None,
    num_keys: int = 0, haystack: Path = EVALUATION,
) -> list[Result]:  # fmt: skip
    """One result per row and text.

    Args:
        sources: `prose`, `code` or files, see `texts.text_units`.
        length, num_chunks: tokens of a text, and texts of a source.
        dtype: of the model.
        show: called with each result.
        num_keys: about as many pass keys are asked for instead of reading `sources`.
        haystack: the text that hides them.
    """
    sizes = Sizes(
        chunk=length, num_chunks=num_chunks, far=length // 2, calibration=min(length, 2048),
        passkeys=spread_keys(num_keys),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(
            model, sizes, Path(folder) / "results.jsonl", rows=rows, sources=sources,
            kinds=("passkey",) if num_keys else ("text",), keys_in=haystack, folder=Path(folder),
            dtype=dtype,
        )  # fmt: skip
        trial.show = show
        trial.prepare()
        trial.run()
    return list(trial.results.values())


def only_one_found(first: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, float]:
    """Answers that only the first got right, that only the other did, and how likely so uneven a
    split is where neither is better: McNemar's exact test, two-sided."""
    mine = sum(a and not b for a, b in zip(first, other, strict=True))
    others = sum(b and not a for a, b in zip(first, other, strict=True))
    num = mine + others
    tail: int = sum(math.comb(num, i) for i in range(min(mine, others) + 1))
    return mine, others, min(1.0, 2 * tail / 2**num)


def run(model: Path, options: Any) -> int:
    """The command: prints a line per row and text, and the means, or how many pass keys each row
    finds; returns the exit status."""
    rows = {row.name: row for row in map(parse_row, options.row)}
    results: list[Result] = []

    def line(name: str, text: str, some: Sequence[Result]) -> None:
        numbers = summarise(rows[name], 1, some).numbers
        cells = "".join(f" {shown(numbers.get(key), form):>8}" for _, key, form in COLUMNS)
        print(f"{name:64} {text:28}{cells}", flush=True)

    def show(result: Result) -> None:
        results.append(result)
        if not options.keys:
            line(result["row"], result["unit"], [result])
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(result) + "\n")

    if not options.keys:
        heads = "".join(f" {head:>8}" for head, *_ in COLUMNS)
        print(f"{'row':64} {'text':28}{heads}", flush=True)
    try:
        measure_rows(
            str(model), list(rows.values()), options.text, options.tokens or 2048,
            options.chunks or 2, options.dtype, show, options.keys, options.haystack or EVALUATION,
        )  # fmt: skip
    finally:
        of_row: dict[str, list[Result]] = {}
        for result in results:
            of_row.setdefault(result["row"], []).append(result)
        if options.keys:
            _show_found(of_row)
        else:
            for name, mine in of_row.items():
                seconds = sum(result["cpu_seconds"] for result in mine)
                line(name, f"mean of {len(mine)}, {seconds:.0f} CPU s", mine)
    return 0


def _show_found(of_row: dict[str, list[Result]]) -> None:
    """Pass keys found by each row, beside the first of them where it has read the same texts."""
    found = {
        name: [
            right for result in sorted(mine, key=lambda r: r["unit"]) for right in result["right"]
        ]
        for name, mine in of_row.items()
    }
    base = next(iter(found), "")
    for name, right in found.items():
        print(f"{name:64} {sum(right)} of {len(right)} keys", end="")
        if name != base and len(right) == len(found[base]):
            mine, others, chance = only_one_found(found[base], right)
            print(f"; {mine} only by {base}, {others} only by this (p = {chance:.2f})", end="")
        print(flush=True)
