# SPDX-License-Identifier: Apache-2.0
"""Plots over bits a value, with labels that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {
    "llama.cpp": "#8c564b", "OpenVINO": "#9467bd", "vLLM": "#555555", "ours": "#2ca02c",
    "ours, mode exact": "#98df8a",
}  # fmt: skip
OFFSETS = [(side, up) for up in (4, -10, 13, -19, 22, -28, 31) for side in (5, -5)]
"""Where a label may stand from its point, the first that is free."""


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
        place_labels(axis, panel.points)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, bbox_inches="tight")
    plt.close(figure)
    return figure


def place_labels(axis: Any, points: list[Point]) -> None:
    """Each point's label at the first offset where it covers no other."""
    axis.figure.canvas.draw()  # the axes' limits, and so where points are, are known from here on
    renderer = axis.figure.canvas.get_renderer()
    taken: list[Any] = []
    for point in sorted(points, key=lambda p: (p.bits, p.value)):
        at = point.bits, point.value
        label = axis.annotate(
            point.label, at, xytext=OFFSETS[0], textcoords="offset points", fontsize=7
        )
        for side, up in OFFSETS:
            label.set_position((side, up))
            label.set_horizontalalignment("left" if side > 0 else "right")
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
