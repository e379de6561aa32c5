# SPDX-License-Identifier: Apache-2.0
"""Draws the results of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_fibquant.evaluation.labels import place_labels

COLOURS = {
    "fibquant_4bit": "#1f77b4",
    "fibquant_k5v3": "#17becf",
    "fibquant_3bit": "#2ca02c",
    "fibquant_2bit": "#ff7f0e",
    "fibquant_1bit": "#d62728",
    "fibquant": "#17becf",
    "auto": "#555555",
    "vllm_fp8_e5m2": "#9467bd",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw_all(results: Path, images: Path) -> Iterator[Path]:
    """Draws every plot whose results exist; yields the files written."""
    import matplotlib

    matplotlib.use("Agg")
    images.mkdir(parents=True, exist_ok=True)
    for draw in (attention, engine, search_lists, load, soak):
        name = {"search_lists": "list"}.get(draw.__name__, draw.__name__)
        rows = rows_of(results / f"{name}.jsonl")
        if rows:
            target = images / f"{name}.png"
            draw(rows).savefig(target, dpi=120, bbox_inches="tight")
            yield target


def attention(rows: list[dict[str, Any]]):
    """Speed of decode attention relative to vLLM's own, by context, one panel per shape."""
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    size = (4.2 * len(shapes), 3.6 * len(kernels))
    figure, axes = plt.subplots(len(kernels), len(shapes), figsize=size, squeeze=False)
    for row, kernel in zip(axes, kernels, strict=True):
        for axis, shape in zip(row, shapes, strict=True):
            mine = [r for r in rows if tuple(r["shape"]) == shape and r["batch"] == 1]
            mine = [r for r in mine if r["kernel"] == kernel]
            if not mine:
                axis.set_visible(False)
                continue
            for name in COLOURS:
                points = sorted((r["context"], r["vs_vllm"]) for r in mine if r["format"] == name)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
            label = f"vLLM, {mine[0]['model_dtype']} KV"
            axis.axhline(1, color="#555555", linestyle="--", label=label)
            axis.set_xscale("log", base=2)
            axis.set_title("{}: d={}, {} x {} heads".format(kernel, *shape), fontsize=9)
            axis.set_xlabel("context (tokens)")
        row[0].set_ylabel("speed of decode attention vs vLLM")
    # Of all panels, below them: within one it would cover lines.
    named = {t: h for a in axes.flat for h, t in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, fontsize=8, loc="lower center", ncols=len(named))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def engine(rows: list[dict[str, Any]]):
    """Milliseconds of one decode step of the engine, by context."""
    import matplotlib.pyplot as plt

    steps = [r for r in rows if r["bench"] == "decode_step"]
    kinds = sorted({(r["kernel"], r["batch"]) for r in steps})
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.6), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        mine = [r for r in steps if (r["kernel"], r["batch"]) == kind]
        for name in COLOURS:
            points = sorted((r["context"], r["median"] * 1e3) for r in mine if r["format"] == name)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
        axis.set_title(f"{kind[0].removeprefix('cpu-')}, {mine[0]['model_dtype']}, batch {kind[1]}")
        axis.set_xlabel("context (tokens)")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("ms per decode step")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    return figure


def search_lists(rows: list[dict[str, Any]]):
    """Speed of encode with a list search against the MSE it adds, one curve per large code."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5))
    placed: list[tuple[float, float, str, str]] = []
    for code in dict.fromkeys(r["code"] for r in rows):
        mine = [r for r in rows if r["code"] == code and r["vs_exhaustive"] > 1 and r["num_lists"]]
        if len(mine) < 2:
            continue
        points = [(max(r["added_mse"], 1e-5) * 100, r["vs_exhaustive"]) for r in mine]
        (line,) = axis.plot(*zip(*points, strict=True), "o-", label=code)
        placed += [
            (*point, str(r["num_lists"]), line.get_color())
            for r, point in zip(mine, points, strict=True)
        ]
    axis.axvline(0.5, color="#555555", linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("added MSE, % (0.001 stands for less)")
    axis.set_ylabel("speed of encode vs exhaustive")
    axis.set_title("numbers of lists searched")
    axis.grid(alpha=0.3, which="both")
    axis.margins(0.1)
    axis.legend(fontsize=8)
    place_labels(axis, placed, 8)
    return figure


def load(rows: list[dict[str, Any]]):
    """Requests per second and 95th percentile of the time to the first token, by concurrency."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained")
    panels = (("requests_per_s", 1.0, "requests / s"), ("p95_ttft_ms", 1e-3, "p95 TTFT (s)"))
    for axis, (column, unit, label) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["format"] for row in rows):
            points = sorted(
                (r["concurrency"], r[column] * unit) for r in rows if r["format"] == name
            )
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
        axis.set_xticks(sorted({row["concurrency"] for row in rows}))
        axis.set_xlabel("requests at once")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def soak(rows: list[dict[str, Any]]):
    """Resident memory of all processes of the server over time; one curve per run."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    for row in rows:
        seconds, rss = zip(*row["samples"], strict=True)
        axis.plot([s / 60 for s in seconds], [r / 2**20 for r in rss], label=row["format"])
    axis.set_xlabel("minutes")
    axis.set_ylabel("resident MiB, all processes")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
