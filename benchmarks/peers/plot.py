# SPDX-License-Identifier: Apache-2.0
"""Plots over bits a value, with labels that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.labels import place_labels

COLOURS = {
    "llama.cpp": "#8c564b", "OpenVINO": "#9467bd", "vLLM": "#555555", "ours": "#2ca02c",
    "ours, mode exact": "#98df8a",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    owner: str
    bits: float
    value: float
    label: str


@dataclass(frozen=True)
class Panel:
    title: str
    points: list[Point]
    log: bool = False


def draw(panels: list[Panel], image: Path) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, dpi=120
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for owner, colour in COLOURS.items():
            points = sorted((p.bits, p.value) for p in panel.points if p.owner == owner)
            if points:
                mark = "s--" if "mode" in owner else "o-"
                axis.plot(*zip(*points, strict=True), mark, color=colour, label=owner)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.margins(0.12)
        if panel.log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("bits a value, everything stored counted")
        axis.set_ylabel(panel.title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    # The legend's place and the axes' sizes are known once all are drawn.
    for axis, panel in zip(axes[0], panels, strict=True):
        ordered = sorted(panel.points, key=lambda p: (p.bits, p.value))
        place_labels(axis, [(p.bits, p.value, p.label, "black") for p in ordered], 7)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, bbox_inches="tight")
    plt.close(figure)
    return figure
