# SPDX-License-Identifier: Apache-2.0
"""Labels of points in a plot that lie neither on each other nor on points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
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
    axis.figure.canvas.draw()
    axis.figure.set_layout_engine("none")  # what is placed stays where it is
    scale = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    taken = _marks(axis, [(x, y) for x, y, _, _ in points], _MARK) + _legend(axis)
    for x, y, label, colour in points:
        if not label or not frame.contains(*axis.transData.transform((x, y))):
            continue
        text = axis.annotate(
            label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour,
            ha="center", va="center",
        )  # fmt: skip
        box = text.get_window_extent().padded(2)
        ways = [
            (
                math.cos(angle) * (distance * scale + box.width / 2 * abs(math.cos(angle))),
                math.sin(angle) * (distance * scale * 0.8 + box.height / 2),
            )
            for distance, angle in itertools.product(_DISTANCES, _ANGLES)
        ]
        # The first of equals is the nearest.
        dx, dy = min(ways, key=lambda way: _num_hit(box.translated(*way), taken, frame))
        text.set_position((dx / scale, dy / scale))
        taken.append(box.translated(dx, dy))
        if math.hypot(dx, dy) > box.width / 2 + 14 * scale:
            axis.annotate(
                "", (x, y), xytext=(dx / scale, dy / scale), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.6},
            )  # fmt: skip


def _marks(axis: Any, points: Iterable[Any], half: float) -> list[Any]:
    """The boxes of marks at these points, half as many points of a letter wide."""
    from matplotlib.transforms import Bbox

    at = [axis.transData.transform(point) for point in points]
    return [Bbox([place, place]).padded(half * axis.figure.dpi / 72) for place in at]


def _legend(axis: Any) -> list[Any]:
    return [axis.get_legend().get_window_extent()] if axis.get_legend() else []


def _num_hit(box: Any, taken: Sequence[Any], frame: Any) -> int:
    """How many boxes one overlaps; leaving the frame counts as one more."""
    is_inside = frame.contains(*box.min) and frame.contains(*box.max)
    return box.count_overlaps(taken) + (not is_inside)


def label_collisions(axis: Any) -> list[str]:
    """Labels of an axis that lie on each other, on a mark of its lines, on the legend or outside.

    For tests of plots; to be asked once everything is placed.
    """
    marked = [line for line in axis.lines if line.get_marker() not in ("None", None)]
    taken = _marks(axis, (p for line in marked for p in line.get_xydata()), _MARK - 1)
    taken += _legend(axis)
    found = []
    for text in axis.texts:
        if text.get_text():  # else a line to a label
            box = text.get_window_extent()
            if _num_hit(box, taken, axis.get_window_extent().padded(0.5)):
                found.append(text.get_text())
            taken.append(box)
    return found
