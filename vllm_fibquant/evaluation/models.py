# SPDX-License-Identifier: Apache-2.0
"""Tables and the frontier over several models: the worst one is the headline."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.engine import Shape
from vllm_fibquant.evaluation.report import CONTEXT, TITLES, Summary, found_of, summarise, table
from vllm_fibquant.evaluation.rows import Row, all_rows
from vllm_fibquant.evaluation.texts import Sizes

README_ROWS = ("fp8 e4m3", "4bit, quality", "3bit, quality", "2bit, quality", "1bit, quality",
               "4bit, exact", "3bit, exact", "q4_0, rotated")  # fmt: skip
"""The rows that decide which preset to take, and what most use instead."""


@dataclass
class Model:
    """What has been measured of one model."""

    name: str
    shape: Shape
    summaries: dict[str, Summary]


@dataclass
class Across:
    """One row over the models that have been measured with it; None for the others."""

    row: Row
    of_model: list[Summary | None]

    def values(self, name: str) -> list[float]:
        found = [s.get(name) for s in self.of_model if s is not None]
        return [value for value in found if value is not None]

    @property
    def num_models(self) -> int:
        return sum(s is not None for s in self.of_model)


def read_models(folder: Path) -> list[Model]:
    """Every model with results in a folder of its own, smallest cache first."""
    found = []
    for path in sorted(folder.glob("*/evaluation.jsonl")):
        shape = Shape(**json.loads((path.parent / "model.json").read_text()))
        newest = {}  # a result that was measured again stands behind the older one
        for line in path.read_text().splitlines():
            result = json.loads(line)
            newest[result["row"], result["unit"]] = result
        by_row: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for (row_name, _), result in newest.items():
            by_row[row_name].append(result)
        summaries = {
            row.name: summarise(row, shape.head_dim, by_row[row.name])
            for row in all_rows(Sizes.step)
            if row.name in by_row
        }
        found.append(Model(path.parent.name, shape, summaries))
    return found


def across(models: Sequence[Model]) -> list[Across]:
    """The rows that models have been measured with on texts."""
    rows = [
        Across(row, [_with_texts(model.summaries.get(row.name)) for model in models])
        for row in all_rows(Sizes.step)
    ]
    return [row for row in rows if row.num_models and row.row.group != "check"]


def _with_texts(summary: Summary | None) -> Summary | None:
    return summary if summary is not None and summary.num_texts else None


def _bits(row: Across) -> str:
    bits = sorted({f"{s.bits:.2f}" for s in row.of_model if s is not None}, key=float)
    return bits[0] if len(bits) == 1 else f"{bits[0]}–{bits[-1]}"


def _worst_and_mean(row: Across) -> list[str]:
    delta, kl, tail, same = (row.values(n) for n in ("delta", "kl", "kl_worst", "same"))
    return [
        _bits(row),
        str(row.num_models),
        f"**{max(delta):.1%}**",
        f"{statistics.fmean(delta):.1%}",
        f"**{max(kl):.4f}**",
        f"{statistics.fmean(kl):.4f}",
        f"{max(tail):.3f}" if tail else "–",
        f"{min(same):.1%}",
    ]


COLUMNS = ("bits", "models", "ΔPPL, worst", "mean", "KL, worst", "mean", "99.9 % KL, worst",
           "same next, worst")  # fmt: skip


def label(row: Row) -> str:
    """As a user asks for it."""
    if row.engine is None or row.group not in ("quality", "exact"):
        return row.name
    preset, options = row.engine
    default = " (the default)" if preset == "fibquant_3bit" and not options else ""
    return f"`{preset}`" + (", exact" if options else "") + default


def readme_block(models: Sequence[Model], names: Sequence[str] = README_ROWS) -> str:
    """The README's table: few rows, the worst model beside the mean."""
    rows = {row.row.name: row for row in across(models)}
    lines = [[label(rows[n].row), *_worst_and_mean(rows[n])] for n in names if n in rows]
    return table(("format", *COLUMNS), lines)


def markdown(models: Sequence[Model]) -> str:
    """All tables over the models, and links to each model's own."""
    rows = across(models)
    texts = sorted({name for m in models for s in m.summaries.values() for name in s.by_text})
    parts = [
        f"Over {len(models)} models: {', '.join(f'[{m.name}]({m.name}/evaluation.md)' for m in models)}. "  # noqa: E501
        "Bold: the worst of those that a row has been measured on (models). "
        "ΔPPL: increase of perplexity; KL: divergence of next-token "
        "distributions from the uncompressed model's, mean and 99.9 % quantile over positions, in "
        "nats; same next: positions with the same likeliest token; bits: stored bits per "
        f"coordinate of a request of {CONTEXT} tokens, windows included, over the models' "
        f"head_dim. Texts: {', '.join(texts)}. Generated by `vllm-fibquant eval --report`.",
        "## In short", readme_block(models),
    ]  # fmt: skip
    for group, title in TITLES.items():
        mine = [row for row in rows if row.row.group == group]
        if mine:
            lines = [[row.row.name, *_worst_and_mean(row), *_each(row)] for row in mine]
            head = ("format", *COLUMNS, *(f"{m.name}: ΔPPL, KL" for m in models))
            parts += [f"## {title}", table(head, lines)]
    return "\n\n".join([*parts, *_cosines(models), *_retrieval(models)]) + "\n"


def _each(row: Across) -> Iterable[str]:
    for s in row.of_model:
        yield f"{s.numbers['delta']:.1%}, {s.numbers['kl']:.4f}" if s else "–"


def _cosines(models: Sequence[Model]) -> list[str]:
    """Attention outputs of our rows, mean over layers and worst layer of each model."""
    names = [r.row.name for r in across(models) if r.row.engine and len(r.values("cosine"))]
    if not names:
        return []
    lines = [
        [name, *(
            "{:.4f}, {:.4f}".format(*(m.summaries[name].numbers[n] for n in ("cosine",
                                                                            "worst_cosine")))
            if name in m.summaries and "cosine" in m.summaries[name].numbers else "–"
            for m in models
        )]
        for name in names
    ]  # fmt: skip
    head = ("format", *(m.name for m in models))
    return ["## Cosine of attention outputs: mean over layers, worst layer", table(head, lines)]


def _retrieval(models: Sequence[Model]) -> list[str]:
    """Keys found, short texts and long ones."""
    lines = []
    for model in models:
        for name, s in model.summaries.items():
            lengths = sorted(s.retrieval)
            if s.retrieval or s.passkey:
                short = [sum(n) for n in zip(*s.passkey.values(), strict=True)]
                lines.append([
                    model.name, name, "{}/{}".format(*short) if short else "–",
                    ", ".join(f"{found_of(s.retrieval, n)} in {n:,}" for n in lengths) or "–",
                ])  # fmt: skip
    if not lines:
        return []
    head = ("model", "format", "keys in short texts", "keys among many in long texts")
    return ["## Keys found", table(head, lines)]


def draw(models: Sequence[Model], folder: Path) -> Path:
    """The frontier of every model: divergence against all stored bits."""
    from vllm_fibquant.evaluation.plots import models_frontier

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation-frontier.png"
    series = {m.name: [s for s in m.summaries.values() if s.num_texts] for m in models}
    models_frontier(series).savefig(path, dpi=110, bbox_inches="tight")
    return path
