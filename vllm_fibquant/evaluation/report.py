# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables and as what the plots draw."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_fibquant.evaluation.engine import Shape
from vllm_fibquant.evaluation.measure import quantile_of_worst
from vllm_fibquant.evaluation.rows import Row
from vllm_fibquant.evaluation.suite import Suite
from vllm_fibquant.evaluation.texts import Sizes
from vllm_fibquant.options import QUALITY_WINDOW

CONTEXT = 4096
"""Tokens of the request that sizes are stated for: windows cost less in longer ones."""

TITLES = {
    "uncompressed": "Uncompressed, and 8 bits",
    "quality": f"Mode quality: newest {QUALITY_WINDOW} and first 4 tokens also in 16 bits",
    "windowed": "Other formats that keep tokens in 16 bits (simulated)",
    "exact": "Mode exact: everything read from codes",
    "rival": "Other formats, everything as stored (simulated)",
    "uncalibrated": "Without a measurement of the model's keys",
    "published": "FibQuant as published: stored norms, everything read from codes",
    "ablation": "Repairs one by one",
    "check": "Checks of the method",
}


@dataclass
class Summary:
    """One row's numbers; None where nothing was measured.

    Attributes:
        bits, page_bits: stored bits per coordinate of a request of CONTEXT tokens, and without
            what depends on its length.
        delta, far_delta: relative increase of perplexity; `*_error` are standard errors over texts.
        passkey: by number of keys, (right, asked); retrieval: by tokens of the text.
        by_text: (relative increase of perplexity, KL) of each text.
        greedy: tokens equal to the uncompressed model's before the first other one, mean.
    """

    row: Row
    bits: float
    page_bits: float
    num_texts: int = 0
    num_tokens: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    passkey: dict[int, tuple[int, int]] = field(default_factory=dict)
    retrieval: dict[int, tuple[int, int]] = field(default_factory=dict)
    by_text: dict[str, tuple[float, float]] = field(default_factory=dict)

    def get(self, name: str) -> float | None:
        return self.numbers.get(name)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values, from which none can be known."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def summarise(row: Row, head_dim: int, results: Iterable[dict[str, Any]]) -> Summary:
    """The summary of one row's result lines."""
    lines = defaultdict(list)
    for result in results:
        lines[result["kind"]].append(result)
    forever = 1 << 40
    summary = Summary(
        row, row.cache_format.bits(head_dim, CONTEXT), row.cache_format.bits(head_dim, forever)
    )
    numbers = summary.numbers
    for line in lines["fidelity"]:
        numbers |= {name: line[name] for name in ("key_error", "value_error", "cosine")}
    texts = lines["text"]
    if texts:
        summary.num_texts = len(texts)
        summary.num_tokens = sum(line["num"] for line in texts)
        numbers["perplexity"] = math.exp(statistics.fmean(line["loss"] for line in texts))
        for prefix in ("", "far_"):
            rises = [line[f"{prefix}loss_increase"] for line in texts]
            kls = [line[f"{prefix}kl"] for line in texts]
            delta = math.expm1(statistics.fmean(rises))
            numbers[f"{prefix}delta"] = delta
            numbers[f"{prefix}delta_error"] = (1 + delta) * standard_error(rises)
            numbers[f"{prefix}kl"] = statistics.fmean(kls)
            numbers[f"{prefix}kl_error"] = standard_error(kls)
            numbers[f"{prefix}same"] = statistics.fmean(line[f"{prefix}same"] for line in texts)
        if all("worst" in line for line in texts):
            numbers["kl_worst"] = quantile_of_worst(texts)
        for name in ("cosine", "worst_cosine"):
            seen = [line[name] for line in texts if name in line]
            if seen:
                numbers[name] = statistics.fmean(seen)
        summary.by_text = {
            line["unit"]: (math.expm1(line["loss_increase"]), line["kl"]) for line in texts
        }
    for kind, found in (("passkey", summary.passkey), ("retrieval", summary.retrieval)):
        for line in lines[kind]:
            size = len(line["right"]) if kind == "passkey" else int(line["unit"].split(":")[2])
            right, asked = found.get(size, (0, 0))
            found[size] = right + sum(line["right"]), asked + len(line["right"])
    if lines["greedy"]:
        numbers["greedy"] = statistics.fmean(line["equal"][0] for line in lines["greedy"])
    return summary


def summarise_all(
    rows: Iterable[Row], shape: Shape, results: Mapping[tuple[str, str], dict[str, Any]]
) -> list[Summary]:
    """One summary per row that anything was measured of; results are by row and unit."""
    by_row = defaultdict(list)
    for (name, _), result in results.items():
        by_row[name].append(result)
    return [summarise(row, shape.head_dim, by_row[row.name]) for row in rows if row.name in by_row]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *rows))


def shown(value: float | None, form: str, error: float | None = None) -> str:
    if value is None or math.isnan(value):
        return "–"
    if error is None or math.isnan(error):
        return format(value, form)
    return f"{value:{form}} ± {error:{form}}"


HEADER = ("format", "bits", "perplexity", "ΔPPL", "KL (nats)", "99.9 % KL", "same next",
          "ΔPPL far", "KL far", "cosine", "worst layer", "texts")  # fmt: skip


def quality_line(s: Summary) -> list[str]:
    get = s.get
    return [
        s.row.name,
        f"{s.bits:.2f}",
        shown(get("perplexity"), ".2f"),
        shown(get("delta"), ".1%", get("delta_error")),
        shown(get("kl"), ".4f", get("kl_error")),
        shown(get("kl_worst"), ".3f"),
        shown(get("same"), ".1%"),
        shown(get("far_delta"), ".1%"),
        shown(get("far_kl"), ".4f"),
        shown(get("cosine"), ".4f"),
        shown(get("worst_cosine"), ".4f"),
        str(s.num_texts),
    ]


def markdown(suite: Suite) -> str:
    """All tables of one model's results."""
    summaries = summarise_all(suite.rows, suite.shape, suite.results)
    sizes, shape = suite.sizes, suite.shape
    coordinates = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    parts = [
        f"{len(suite.results)} of {len(suite.jobs)} results. Texts of {sizes.chunk} tokens; far: "
        f"positions from {sizes.far} on; bits: stored bits per coordinate of a request of "
        f"{CONTEXT} tokens, windows, scales and norms included; steps of {sizes.step} tokens in "
        "mode quality. Generated by `vllm-fibquant eval`; docs/evaluation.md says how."
    ]
    for group, title in TITLES.items():
        mine = [s for s in summaries if s.row.group == group and s.num_texts]
        if mine:
            parts += [f"## {title}", table(HEADER, map(quality_line, mine))]
    parts += _by_text(summaries) + _tasks(summaries, sizes, coordinates) + _ends(summaries)
    return "\n\n".join([*parts, check_text(suite)]).rstrip() + "\n"


def _by_text(summaries: Sequence[Summary]) -> list[str]:
    """Main rows, text by text."""
    mine = [s for s in summaries if s.row.main and s.by_text]
    names = list(dict.fromkeys(name for s in mine for name in s.by_text))
    if not names:
        return []
    lines = [
        [s.row.name, *(
            "{:.2%}, {:.4f}".format(*s.by_text[n]) if n in s.by_text else "–" for n in names
        )]
        for s in mine
    ]  # fmt: skip
    return ["## Text by text: ΔPPL, KL", table(("format", *names), lines)]


def found_of(counts: dict[int, tuple[int, int]], size: int) -> str:
    return "{}/{}".format(*counts[size]) if size in counts else "–"


def _tasks(summaries: Sequence[Summary], sizes: Sizes, coordinates: int) -> list[str]:
    """Pass keys, retrieval and greedy answers."""
    tasks = [s for s in summaries if s.passkey or s.retrieval or s.get("greedy") is not None]
    if not tasks:
        return []
    counts = sorted({n for s in tasks for n in s.passkey})
    lengths = sorted({n for s in tasks for n in s.retrieval})
    lines = [
        [
            s.row.name,
            f"{s.bits:.2f}",
            *(found_of(s.passkey, n) for n in counts),
            *(found_of(s.retrieval, n) for n in lengths),
            shown(s.get("greedy"), ".1f"),
            f"{int(2**33 / (coordinates * s.bits)):,}",
        ]
        for s in tasks
    ]
    head = ["format", "bits", *(f"{n} key{'s' * (n > 1)}" for n in counts),
            *(f"of many in {n}" for n in lengths), f"greedy, of {sizes.answer_length}",
            "tokens per GiB"]  # fmt: skip
    return ["## Pass keys, long retrieval, greedy answers, capacity", table(head, lines)]


def _ends(summaries: Sequence[Summary]) -> list[str]:
    ends = [s for s in summaries if s.row.group == "frontier"]
    if not ends:
        return []
    lines = [
        [
            s.row.name,
            f"{s.page_bits:.3f}",
            f"{16 / s.page_bits:.1f}x / {32 / s.page_bits:.1f}x",
            shown(s.get("key_error"), ".4f"),
            shown(s.get("value_error"), ".4f"),
            shown(s.get("cosine"), ".4f"),
        ]
        for s in ends
    ]
    head = ["code", "bits of codes", "x 16 / 32 bits", "key error", "value error", "cosine"]
    return ["## Ends of the published frontier", table(head, lines)]


def check_text(suite: Suite) -> str:
    """Engine beside simulation of the same format, on the texts that both were measured on."""
    lines = []
    for name in (row.name for row in suite.rows if row.name.endswith(", simulated")):
        engine_name = name.removesuffix(", simulated")
        pairs = [
            (suite.results[engine_name, unit], result)
            for (row, unit), result in suite.results.items()
            if row == name and result["kind"] == "text" and (engine_name, unit) in suite.results
        ]
        if pairs:
            found = []
            for metric, label in (("kl", "KL"), ("loss_increase", "increase of loss")):
                engine, simulated = (
                    statistics.fmean(r[metric] for r in x) for x in zip(*pairs, strict=True)
                )
                error = standard_error([a[metric] - b[metric] for a, b in pairs])
                found.append(
                    f"{label} {engine:.4f} through the engine, {simulated:.4f} simulated "
                    f"(standard error of the difference {shown(error, '.4f')})"
                )
            lines.append(f"- {engine_name}, {len(pairs)} texts: {'; '.join(found)}")
    return "\n".join(["## Engine against simulation", "", *lines]) if lines else ""
