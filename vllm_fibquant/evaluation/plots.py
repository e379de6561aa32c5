# SPDX-License-Identifier: Apache-2.0
"""The frontier, bits against loss, and what each repair does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.report import CONTEXT, Summary

STYLES = {
    "published": ("s", "#d62728", "FibQuant as published"),
    "exact": ("o", "#1f77b4", "ours, mode exact"),
    "quality": ("*", "#2ca02c", "ours, mode quality"),
    "rival": ("x", "#555555", "other formats (simulated)"),
    "uncompressed": ("d", "#000000", "bf16, fp8"),
}
LADDER = ("as published", "exact", "gains, first 4", "gains, window 64", "quality")


def draw_all(summaries: Sequence[Summary], folder: Path, name: str) -> Iterator[Path]:
    """Draws what there are results for into files that begin with `name`; yields their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (frontier, ablation):
        figure = draw([s for s in summaries if s.num_texts])
        if figure is not None:
            path = folder / f"{name}-{draw.__name__}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            yield path


def _short(name: str) -> str:
    for long, short in (("TurboQuant", "TQ"), (" bits", "b"), (", norm-corrected", " nc"),
                        (", residual ", " R"), (" as published", ""), (", exact", ""),
                        (", quality", ""), (", 1 % outliers", " 1%")):  # fmt: skip
        name = name.replace(long, short)
    return name


def frontier(summaries: Sequence[Summary]) -> Any:
    """Increase of perplexity and KL divergence against all stored bits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    for axis, name, label in (
        (axes[0], "delta", "increase of perplexity"),
        (axes[1], "kl", "KL from the uncompressed model, nats"),
    ):
        for group, (mark, colour, title) in STYLES.items():
            points = [
                (s.bits, max(s.numbers[name], 1e-4), _short(s.row.name))
                for s in summaries
                if s.row.group == group and (group != "rival" or s.row.main)
            ]
            if not points:
                continue
            x, y, names = zip(*points, strict=True)
            axis.plot(x, y, mark, color=colour, label=title, markersize=7, linestyle="none")
            for point in zip(x, y, names, strict=True):
                axis.annotate(point[2], point[:2], xytext=(5, 3), textcoords="offset points",
                              fontsize=7, color=colour)  # fmt: skip
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 3, 4, 5, 8, 16], ["1", "2", "3", "4", "5", "8", "16"])
        axis.set_xlabel(f"stored bits per value at {CONTEXT:,} tokens, windows included")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    return figure


def ablation(summaries: Sequence[Summary]) -> Any:
    """KL divergence after each repair, all positions and far ones; None without such rows."""
    import matplotlib.pyplot as plt

    named = {s.row.name: s for s in summaries}
    rates = [r for r in ("3bit", "2bit") if f"{r} as published" in named and f"{r}, exact" in named]
    if not rates:
        return None
    figure, axes = plt.subplots(1, len(rates), figsize=(6 * len(rates), 4), squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        steps = [
            (step, named[name])
            for step in LADDER
            if (name := f"{rate} {step}" if step == "as published" else f"{rate}, {step}") in named
        ]
        steps += [
            (s.row.name.removeprefix(f"{rate}, "), s)
            for s in summaries
            if s.row.group == "quality" and s.row.name.startswith(f"{rate}, quality,")
        ]
        for offset, name, colour in ((-0.2, "kl", "#1f77b4"), (0.2, "far_kl", "#ff7f0e")):
            values = [s.numbers[name] for _, s in steps]
            label = {"kl": "all positions", "far_kl": "far positions"}[name]
            places = [i + offset for i in range(len(steps))]
            bars = axis.bar(places, values, 0.4, color=colour, label=label)
            axis.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=7)
        titles = {"exact": "+ gains", "gains, first 4": "+ gains, first 4 tokens",
                  "gains, window 64": "+ gains, window 64", "quality": "+ all three"}  # fmt: skip
        axis.set_xticks(
            range(len(steps)), [titles.get(s, s) for s, _ in steps], rotation=20, fontsize=8
        )
        axis.set_ylabel("KL from the uncompressed model, nats")
        axis.set_title(rate)
        axis.legend(fontsize=8)
    return figure
