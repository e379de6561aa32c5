# SPDX-License-Identifier: Apache-2.0
"""Labels of points in a plot that lie neither on each other nor on points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

_MARK = 4
"""Half a mark's width, in points: markersize is at most twice as much."""
_DISTANCES = (6, 12, 20, 30, 42, 56, 72, 90)
_ANGLES = tuple(math.radians(a) for a in (30, -30, 150, -150, 90, -90, 0, 180, 60, -60, 120, -120))


def place_labels(axis: Any, points: Sequence[tuple[float, float, str, str]], size: float) -> None:
    """Writes each point's label at the nearest free place; a line leads to those farther away.

    To be called last: limits and size of the axis must not change afterwards.

    Args:
        points: x, y, label and colour of each, in the order in which they may choose; an empty
            label's point is only kept free, and one outside the axis gets none.
        size: of the letters, in points.
    """
    figure = axis.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # what is placed stays where it is
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    at = [tuple(axis.transData.transform((x, y))) for x, y, _, _ in points]
    frame = axis.get_window_extent(renderer)
    legend = axis.get_legend()
    mark = _MARK * scale
    taken = [(x - mark, y - mark, x + mark, y + mark) for x, y in at]
    if legend is not None:
        taken.append(legend.get_window_extent(renderer).extents)
    for (px, py), (x, y, label, colour) in zip(at, points, strict=True):
        if not label or not frame.contains(px, py):
            continue
        text = axis.annotate(
            label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour,
            ha="center", va="center",
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        half = box.width / 2 + 2, box.height / 2 + 2
        best, best_cost = (0.0, 0.0), math.inf
        for distance, angle in itertools.product(_DISTANCES, _ANGLES):
            dx = math.cos(angle) * (distance * scale + half[0] * abs(math.cos(angle)))
            dy = math.sin(angle) * (distance * scale * 0.8 + half[1])
            place = px + dx - half[0], py + dy - half[1], px + dx + half[0], py + dy + half[1]
            cost = sum(_overlap(place, other) for other in taken) + _outside(place, frame.extents)
            if cost < best_cost:
                best, best_cost = (dx, dy), cost
            if cost == 0:
                break
        dx, dy = best
        text.set_position((dx / scale, dy / scale))
        taken.append((px + dx - half[0], py + dy - half[1], px + dx + half[0], py + dy + half[1]))
        if math.hypot(dx, dy) > half[0] + 14 * scale:
            axis.annotate(
                "", (x, y), xytext=(dx / scale, dy / scale), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.6},
            )  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(a: Sequence[float], frame: Sequence[float]) -> float:
    """Area of a that lies outside the frame."""
    return (a[2] - a[0]) * (a[3] - a[1]) - _overlap(a, frame)


def label_collisions(axis: Any) -> list[str]:
    """Labels of an axis that lie on each other, on a mark of its lines, on the legend or outside.

    For tests of plots; to be asked once everything is placed.
    """
    mark = _MARK * axis.figure.dpi / 72 - 1
    marked = [line for line in axis.lines if line.get_marker() not in ("None", None)]
    at = [axis.transData.transform(p) for line in marked for p in line.get_xydata()]
    others = [("a mark", (x - mark, y - mark, x + mark, y + mark)) for x, y in at]
    if axis.get_legend() is not None:
        others.append(("the legend", axis.get_legend().get_window_extent().extents))
    frame = axis.get_window_extent().extents
    found = []
    for text in axis.texts:
        if not text.get_text():
            continue  # a line to a label
        box = text.get_window_extent().extents
        found += [f"{text.get_text()} on {what}" for what, x in others if _overlap(box, x) > 0]
        if _outside(box, frame) > 0.5:
            found.append(f"{text.get_text()} outside")
        others.append((text.get_text(), box))
    return found
