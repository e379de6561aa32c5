# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables and as what the plots draw."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_fibquant.evaluation.rows import Row
from vllm_fibquant.evaluation.suite import Suite

CONTEXT = 4096
"""Tokens of the request that sizes are stated for: windows cost less in longer ones."""

TITLES = {
    "uncompressed": "Uncompressed, and 8 bits",
    "published": "FibQuant as published: stored norms, everything read from codes",
    "exact": "Mode exact: everything read from codes",
    "quality": "Mode quality: newest 64 and first 4 tokens also in 16 bits",
    "ablation": "Repairs one by one",
    "rival": "Other formats (simulated)",
    "check": "Checks of the method",
}


@dataclass
class Summary:
    """One row's numbers; None where nothing was measured.

    Attributes:
        bits, page_bits: stored bits per coordinate of a request of CONTEXT tokens, and without
            what depends on its length.
        delta, far_delta: relative increase of perplexity; `*_error` are standard errors over texts.
        passkey: by number of keys, (right, asked).
        greedy: tokens equal to the uncompressed model's before the first other one, mean.
    """

    row: Row
    bits: float
    page_bits: float
    num_texts: int = 0
    num_tokens: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    passkey: dict[int, tuple[int, int]] = field(default_factory=dict)

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
    for line in lines["passkey"]:
        right, asked = summary.passkey.get(len(line["right"]), (0, 0))
        summary.passkey[len(line["right"])] = right + sum(line["right"]), asked + len(line["right"])
    if lines["greedy"]:
        numbers["greedy"] = statistics.fmean(line["equal"][0] for line in lines["greedy"])
    return summary


def summarise_all(suite: Suite) -> list[Summary]:
    """One summary per row of the plan that anything was measured of."""
    by_row = defaultdict(list)
    for (name, _), result in suite.results.items():
        by_row[name].append(result)
    return [
        summarise(row, suite.simulator.head_dim, by_row[row.name])
        for row in suite.rows
        if row.name in by_row
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *rows))


def _shown(value: float | None, form: str, error: float | None = None) -> str:
    if value is None or math.isnan(value):
        return "–"
    if error is None or math.isnan(error):
        return format(value, form)
    return f"{value:{form}} ± {error:{form}}"


def quality_line(s: Summary) -> list[str]:
    get = s.get
    return [
        s.row.name,
        f"{s.bits:.2f}",
        _shown(get("perplexity"), ".2f"),
        _shown(get("delta"), ".1%", get("delta_error")),
        _shown(get("kl"), ".4f", get("kl_error")),
        _shown(get("far_delta"), ".1%"),
        _shown(get("far_kl"), ".4f"),
        _shown(get("same"), ".1%"),
        _shown(get("key_error"), ".4f"),
        _shown(get("value_error"), ".4f"),
        _shown(get("cosine"), ".4f"),
        str(s.num_texts),
    ]


def markdown(suite: Suite) -> str:
    """All tables of a suite's results."""
    summaries = summarise_all(suite)
    sizes, simulator = suite.sizes, suite.simulator
    coordinates = 2 * simulator.num_layers * simulator.num_kv_heads * simulator.head_dim
    parts = [
        f"Model {suite.results and next(iter(suite.results.values()))['model']}: "
        f"{len(suite.results)} of {len(suite.jobs)} results. "
        f"Texts of {sizes.chunk} tokens; far: positions from {sizes.far} on; bits: stored bits per "
        f"coordinate of a request of {CONTEXT} tokens, windows, scales and norms included; "
        f"steps of {sizes.step} tokens in mode quality. Generated by `vllm-fibquant eval`."
    ]
    header = ("format", "bits", "perplexity", "ΔPPL", "KL (nats)", "ΔPPL far", "KL far",
              "same next", "key error", "value error", "cosine", "texts")  # fmt: skip
    for group, title in TITLES.items():
        mine = [s for s in summaries if s.row.group == group]
        if mine:
            parts += [f"## {title}", table(header, map(quality_line, mine))]

    tasks = [s for s in summaries if s.passkey]
    counts = sorted({n for s in tasks for n in s.passkey})
    if tasks:
        lines = [
            [
                s.row.name,
                f"{s.bits:.2f}",
                *("{}/{}".format(*s.passkey[n]) if n in s.passkey else "–" for n in counts),
                _shown(s.get("greedy"), ".1f"),
                f"{int(2**33 / (coordinates * s.bits)):,}",
            ]
            for s in tasks
        ]
        head = ["format", "bits", *(f"{n} key{'s' * (n > 1)}" for n in counts),
                f"greedy, of {sizes.answer_length}", "tokens per GiB"]  # fmt: skip
        parts += ["## Pass keys, greedy answers, capacity", table(head, lines)]

    ends = [s for s in summaries if s.row.group == "frontier"]
    if ends:
        lines = [
            [
                s.row.name,
                f"{s.page_bits:.3f}",
                f"{16 / s.page_bits:.1f}x / {32 / s.page_bits:.1f}x",
                _shown(s.get("key_error"), ".4f"),
                _shown(s.get("value_error"), ".4f"),
                _shown(s.get("cosine"), ".4f"),
            ]
            for s in ends
        ]
        head = ["code", "bits of codes", "x 16 / 32 bits", "key error", "value error", "cosine"]
        parts += ["## Ends of the published frontier", table(head, lines)]
    return "\n\n".join([*parts, check_text(suite)]).rstrip() + "\n"


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
            shown = []
            for metric, label in (("kl", "KL"), ("loss_increase", "increase of loss")):
                engine, simulated = (
                    statistics.fmean(r[metric] for r in x) for x in zip(*pairs, strict=True)
                )
                error = standard_error([a[metric] - b[metric] for a, b in pairs])
                shown.append(
                    f"{label} {engine:.4f} through the engine, {simulated:.4f} simulated "
                    f"(standard error of the difference {_shown(error, '.4f')})"
                )
            lines.append(f"- {engine_name}, {len(pairs)} texts: {'; '.join(shown)}")
    return "\n".join(["## Engine against simulation", "", *lines]) if lines else ""
