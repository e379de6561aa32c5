# SPDX-License-Identifier: Apache-2.0
"""The frontier, bits against loss, and what each repair does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.labels import place_labels
from vllm_fibquant.evaluation.report import CONTEXT, Summary
from vllm_fibquant.options import QUALITY_WINDOW

STYLES = {
    "quality": ("*", "#2ca02c", "ours, mode quality"),
    "exact": ("o", "#1f77b4", "ours, mode exact"),
    "uncalibrated": ("v", "#9467bd", "ours, not calibrated"),
    "published": ("s", "#d62728", "FibQuant as published"),
    "rival": ("x", "#555555", "others, everything as stored (simulated)"),
    "windowed": ("+", "#a05a00", "others, with tokens in 16 bits (simulated)"),
    "uncompressed": ("d", "#000000", "bf16, fp8"),
}
WINDOW_ALONE = f"gains, window {QUALITY_WINDOW}"
LADDER = ("as published", "exact, uncalibrated", "gains, first 4", WINDOW_ALONE,
          "quality, uncalibrated", "quality, means", "quality, transform")  # fmt: skip
LEAST = 2e-4
"""Where what is lower is drawn."""


def draw_all(summaries: Sequence[Summary], folder: Path, name: str) -> Iterator[Path]:
    """Draws what there are results for into files that begin with `name`; yields their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (frontier, ablation):
        figure = draw([s for s in summaries if s.num_texts])
        if figure is not None:
            path = folder / f"{name}-{draw.__name__}.png"
            figure.savefig(path, dpi=120)
            yield path


def _short(name: str) -> str:
    for long, short in (("TurboQuant", "TQ"), (" bits", "b"), (", norm-corrected", " nc"),
                        (", residual ", " R"), (" as published", ""), (", exact", ""),
                        (", uncalibrated", ""), (", quality", ""),
                        (", 1 % outliers", "")):  # fmt: skip
        name = name.replace(long, short)
    return name


def _is_drawn(s: Summary) -> bool:
    return s.row.group in STYLES and s.row.name != "bf16"


def _frontier_axis(axis: Any, summaries: Sequence[Summary], name: str, label: str) -> list[Any]:
    """Draws one number against all stored bits; returns the labels that are to be placed."""
    labels = []
    for group, (mark, colour, title) in STYLES.items():
        mine = [s for s in summaries if s.row.group == group and _is_drawn(s)]
        if not mine:
            continue
        x, y = [s.bits for s in mine], [max(s.numbers[name], LEAST) for s in mine]
        axis.plot(x, y, mark, color=colour, label=title, markersize=7, linestyle="none")
        labels += [
            (*point, _short(s.row.name) if is_named else "", colour)
            for s, point in zip(mine, zip(x, y, strict=True), strict=True)
            for is_named in [s.row.main or s.row.core or group == "published"]
        ]
    axis.set_yscale("log")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 3, 4, 5, 8], ["1", "2", "3", "4", "5", "8"])
    axis.set_xlim(1, 9)
    axis.set_xlabel(f"stored bits per value at {CONTEXT:,} tokens, windows included")
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    return labels


def frontier(summaries: Sequence[Summary]) -> Any:
    """Increase of perplexity and KL divergence against all stored bits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 7), layout="constrained")
    placed = [
        _frontier_axis(axes[0], summaries, "delta", "increase of perplexity"),
        _frontier_axis(axes[1], summaries, "kl", "KL from the uncompressed model, nats"),
    ]
    axes[0].legend(fontsize=8, loc="upper right")
    for axis, labels in zip(axes, placed, strict=True):
        place_labels(axis, labels, 7)
    return figure


def models_frontier(series: Mapping[str, Sequence[Summary]]) -> Any:
    """KL divergence against all stored bits, a panel for each model, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(series) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(14, 6.5 * rows), layout="constrained", squeeze=False, sharey=True
    )
    placed = []
    for axis, (name, summaries) in zip(axes.flat, series.items(), strict=False):
        common = [s for s in summaries if s.row.main or s.row.core]
        placed.append((axis, _frontier_axis(axis, common, "kl", "KL, nats")))
        axis.set_title(name)
    for axis in axes.flat[len(series) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=8, loc="upper right")
    for axis, labels in placed:
        place_labels(axis, labels, 7.5)
    return figure


def ablation(summaries: Sequence[Summary]) -> Any:
    """KL divergence after each repair, all positions and far ones; None without such rows."""
    import matplotlib.pyplot as plt

    named = {s.row.name: s for s in summaries}
    rates = [r for r in ("3bit", "2bit") if f"{r} as published" in named]
    if not rates:
        return None
    figure, axes = plt.subplots(
        1, len(rates), figsize=(6.5 * len(rates), 4.5), squeeze=False, layout="constrained"
    )
    titles = {"exact, uncalibrated": "+ gains", "gains, first 4": "+ first 4 tokens",
              WINDOW_ALONE: f"or window {QUALITY_WINDOW}", "quality, uncalibrated": "+ both",
              "quality, means": "+ means", "quality, transform": "+ transform"}  # fmt: skip
    for axis, rate in zip(axes[0], rates, strict=True):
        steps = [
            (step, named[name])
            for step in LADDER
            if (name := f"{rate} {step}" if step == "as published" else f"{rate}, {step}") in named
        ]
        for offset, name, colour in ((-0.2, "kl", "#1f77b4"), (0.2, "far_kl", "#ff7f0e")):
            values = [s.numbers[name] for _, s in steps]
            label = {"kl": "all positions", "far_kl": "far positions"}[name]
            places = [i + offset for i in range(len(steps))]
            bars = axis.bar(places, values, 0.4, color=colour, label=label)
            axis.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=7)
        names = [titles.get(s, s) for s, _ in steps]
        axis.set_xticks(range(len(steps)), names, rotation=20, fontsize=8)
        axis.set_ylabel("KL from the uncompressed model, nats")
        axis.set_title(rate)
        axis.legend(fontsize=8)
    return figure
