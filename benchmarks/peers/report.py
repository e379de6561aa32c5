# SPDX-License-Identifier: Apache-2.0
"""The tables in docs/peers.md and their plots, from what `make peers` measured."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES
from benchmarks.peers.plot import Panel, Point, draw
from benchmarks.peers.shapes import SHAPES
from vllm_fibquant.codec.config import is_fibquant
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.options import parse_options

CONTEXT = 8192
"""Tokens at which bytes per token are stated: ours keep some tokens in 16 bits as well."""

BITS = {
    "auto": 16, "f32": 32, "f16": 16, "bf16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8,
    # llama.cpp: blocks of 32 values with a scale of 16 bits, q5_1 also a minimum.
    "q8_0": 8.5, "q5_1": 6, "q4_0": 4.5,
}  # fmt: skip
OPENVINO = {"u8": (8, 64), "u4": (4, 64), "turbo4": (4, 32), "turbo3": (3, 32)}
"""Bits of a value, and of a vector's scale and zero point, or norm, in float32."""

UNSTEADY = 0.15
"""A cell whose middle half of steps lies further from the median is named."""


def bits_of(kind: str, head_dim: int, windows: Sequence[int | None] = (None,)) -> float:
    """Bits of a value in a cache of CONTEXT tokens, everything stored counted.

    Args:
        windows: newest tokens that each layer's cache holds; None: all.
    """
    preset, _, options = kind.partition(" ")
    if is_fibquant(preset):
        parsed = parse_options(preset, {"fibquant": json.loads(options) if options else {}})
        coded = preset_layout(parsed.preset, head_dim).effective_rate
        held = tokens_held(windows)
        return coded + 16 * sum(min(parsed.num_copies, n) for n in held) / sum(held)
    if kind in OPENVINO:
        bits, beside = OPENVINO[kind]
        return bits + beside / head_dim
    return BITS[kind]


def tokens_held(windows: Sequence[int | None]) -> list[int]:
    """Of CONTEXT tokens those in each layer's cache."""
    return [min(window or CONTEXT, CONTEXT) for window in windows]


def label_of(row: dict[str, Any]) -> str:
    kind = re.sub(r' \{"mode": "(\w+)"\}', r", mode \1", row["kind"])
    return f"`{kind}`" if ", " not in kind else "`" + kind.replace(", ", "`, ", 1)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a result is of: a later one takes the place of an earlier one."""
    return row["bench"], row["model"], row["engine"], row["kind"], row.get("context")


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last result of each thing measured."""
    return list({key_of(row): row for row in rows}.values())


def text_models(rows: list[dict[str, Any]]) -> list[str]:
    """Models of words, in the order in which they were first measured."""
    return list(dict.fromkeys(row["model"] for row in rows if row["model"] not in SHAPES))


def by_cache(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Engine, kind and its rows, in the engines' order."""
    for name, engine in ENGINES.items():
        for kind in engine.KINDS:
            of = [row for row in rows if (row["engine"], row["kind"]) == (name, kind)]
            if of:
                yield name, kind, of


def as_table(head: list[str], lines: list[list[str]]) -> str:
    rule = "| --- | --- |" + " ---: |" * (len(head) - 2)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )


def speed_cells(rows: list[dict[str, Any]], columns: list[tuple[str, int]]) -> list[str]:
    """Tokens per second of each (model, context): a dash where it was left out."""
    found = {(r["model"], r["context"]): r for r in rows if r["bench"] == "speed"}
    cells = []
    for column in columns:
        row = found.get(column, {})
        speed = row.get("tokens_per_second")
        cells.append(f"{speed:.1f}" if speed else "–" if row else "")
    return cells


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Size, quality and, where it was measured, speed of each cache on a model of words."""
    found = [row for row in newest(rows) if row["model"] == model]
    contexts = sorted({row["context"] for row in found if row["bench"] == "speed"})
    head = ["engine", "cache", "bits a value", "bytes a token", "ΔPPL", "KL"]
    head += ["KL of one position in a thousand", *(f"tokens/s at {n:,}" for n in contexts)]
    lines = []
    for engine, kind, of in by_cache(found):
        windows = of[0].get("windows", [None])
        bits = bits_of(kind, of[0]["head_dim"], windows)
        held = statistics.fmean(tokens_held(windows)) / CONTEXT
        size = bits * of[0]["head_dim"] * of[0]["vectors_per_token"] * held / 8
        cells = [engine, label_of(of[0]), f"{bits:.2f}", f"{size:,.0f}"]
        quality = next((row for row in of if row["bench"] == "quality"), None)
        if quality is None:
            cells += ["", "", ""]
        elif "left_out" in quality:
            cells += ["–", "–", "–"]
        elif kind == quality["against"]:
            cells += ["0", "0", "0"]
        else:
            cells += [f"{quality['delta_ppl']:+.1%}", f"{quality['kl']:.4f}"]
            cells.append(f"{quality['kl_999']:.2f}")
        lines.append(cells + speed_cells(of, [(model, n) for n in contexts]))
    return as_table(head, lines)


def shapes_table(rows: list[dict[str, Any]]) -> str:
    """Speed of each cache on the random models, bits a value at CONTEXT tokens."""
    found = [row for row in newest(rows) if row["model"] in SHAPES]
    columns = sorted({(row["model"], row["context"]) for row in found})
    head = ["engine", "cache"]
    for model, context in columns:
        shape = SHAPES[model]
        head.append(
            f"{shape.num_kv_heads} x {shape.group_size} x {shape.head_dim}, {context:,} tokens"
        )
    return as_table(
        head,
        [[name, label_of(of[0]), *speed_cells(of, columns)] for name, kind, of in by_cache(found)],
    )


HEADLINE = (
    ("OpenVINO", "u8"), ("llama.cpp", "q8_0"), ("vLLM", "fp8_e4m3"), ("OpenVINO", "u4"),
    ("llama.cpp", "q4_0"), ("OpenVINO", "turbo4"), ("OpenVINO", "turbo3"),
    ("vLLM", "fibquant_4bit"), ("vLLM", "fibquant_3bit"), ("vLLM", "fibquant_2bit"),
)  # fmt: skip
"""Caches that the README quotes: the default, and what users of other engines take."""


def headline(rows: list[dict[str, Any]]) -> str:
    """Increase of perplexity and KL of a few caches on every model of words, the newest first."""
    models = text_models(rows)[::-1]
    found = {
        (row["engine"], row["kind"], row["model"]): row
        for row in newest(rows)
        if row["bench"] == "quality" and "kl" in row
    }
    lines = []
    for engine, kind in HEADLINE:
        of = [found.get((engine, kind, model)) for model in models]
        bits = {bits_of(kind, r["head_dim"], r.get("windows", [None])) for r in of if r}
        span = "–".join(f"{b:.1f}" for b in sorted({min(bits), max(bits)})) if bits else "–"
        cells = [f"{r['delta_ppl']:+.1%}, {r['kl']:.4f}" if r else "–" for r in of]
        lines.append([f"{engine}, `{kind}`", span, *cells])
    return as_table(["cache", "bits a value", *models], lines)


def about_speed(rows: list[dict[str, Any]]) -> str:
    """Which run, machine and versions the speeds are of, how steady they were, and what is not
    there."""
    speeds = [row for row in newest(rows) if row["bench"] == "speed"]
    if not speeds:
        return ""
    runs = sorted({f"run {row['run']}" if "run" in row else "pieces" for row in speeds})
    cpus = sorted({f"{row['cpu']}, {row['threads']} threads" for row in speeds if "threads" in row})
    versions = sorted({row["version"] for row in speeds if "version" in row})
    lines = [f"Speeds of {' and '.join(runs)}, {'; '.join(cpus)}; {', '.join(versions)}."]
    unsteady = [where_of(row) for row in speeds if "seconds" in row and spread_of(row) > UNSTEADY]
    if unsteady:
        lines.append(
            f"The middle half of the steps lay further than {UNSTEADY:.0%} from the median in "
            f"{len(unsteady)} of {len(speeds)} cells: {'; '.join(unsteady)}."
        )
    return "\n\n".join(lines + left_out(speeds))


def about_quality(rows: list[dict[str, Any]], model: str) -> str:
    """What was read of a model, how far the engines' widest caches agree, the versions, and what is
    not there."""
    found = [r for r in newest(rows) if (r["bench"], r["model"]) == ("quality", model)]
    agree = [
        f"of {row['engine']}'s {label_of(row)} {row['kl_vllm']:.0e}"
        for row in found
        if "kl_vllm" in row
    ]
    versions = sorted({row["version"] for row in found if "version" in row})
    lines = [f"KL from vLLM's `auto`: {', '.join(agree)}."] if agree else []
    read = {", ".join(row["texts"]) for row in found if "texts" in row}
    lines += [f"Read: {' and '.join(sorted(read))}."] if read else []
    return "\n\n".join([*lines, f"{', '.join(versions)}.", *left_out(found)])


def left_out(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each reason of cells that were not measured."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "left_out" in row:
            reasons.setdefault(row["left_out"], []).append(where_of(row))
    return [f"Left out (–): {'; '.join(of)}: {reason}." for reason, of in reasons.items()]


def where_of(row: dict[str, Any]) -> str:
    at = f" at {row['context']:,}" if "context" in row else ""
    return f"{row['engine']} {label_of(row)} on {row['model']}{at}"


def spread_of(row: dict[str, Any]) -> float:
    """How far the middle half of a cell's steps lies from their median, as a part of it."""
    low, middle, high = statistics.quantiles(row["seconds"], n=4)
    return max(middle - low, high - middle) / middle


def write(results: Path, page: Path, images: Path, front: Path) -> None:
    """Puts the tables of `results` between the marks in `page`, the headline between those in
    `front`, and draws them below `images`."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    first, *others = text_models(rows)
    text = put(page.read_text(), "peers", table(rows, first))
    draw(quality_panel(rows, first), images / "peers.png")
    if others:
        text = put(text, "models", "\n\n".join(section(rows, model) for model in others))
        for model in others:
            draw(quality_panel(rows, model), images / f"peers-{model}.png")
    if any(row["model"] in SHAPES for row in rows):
        image = "![tokens a second against bits](images/peers-shapes.png)"
        text = put(text, "shapes", f"{shapes_table(rows)}\n\n{image}")
        draw(shape_panels(rows), images / "peers-shapes.png")
    page.write_text(put(text, "speed", about_speed(rows)))
    front.write_text(put(front.read_text(), "peers", headline(rows)))


def section(rows: list[dict[str, Any]], model: str) -> str:
    """A model's part of the page."""
    image = f"![divergence against bits](images/peers-{model}.png)"
    parts = [f"### {model}", table(rows, model), about_quality(rows, model), image]
    return "\n\n".join(parts)


def put(text: str, name: str, what: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{what}\n{end}{rest.split(end)[1]}"


def quality_panel(rows: list[dict[str, Any]], model: str) -> list[Panel]:
    """KL against bits, and speed at the longest context, of a model of words."""
    found = [row for row in newest(rows) if row["model"] == model]
    quality = [row for row in found if row["bench"] == "quality"]
    return [
        Panel("mean KL, nats", points_of(quality, "kl"), log=True),
        *speed_panels([row for row in found if row["bench"] == "speed"], ""),
    ]


def shape_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Speed at each shape's longest context."""
    found = newest(rows)
    return [
        panel
        for name in SHAPES
        for panel in speed_panels([row for row in found if row["model"] == name], f"{name}, ")
    ]


def speed_panels(rows: list[dict[str, Any]], of: str) -> list[Panel]:
    longest = max((row["context"] for row in rows), default=0)
    points = points_of([r for r in rows if r["context"] == longest], "tokens_per_second")
    return [Panel(f"{of}decode, tokens/s at {longest:,} tokens", points)] if points else []


def points_of(rows: list[dict[str, Any]], field: str) -> list[Point]:
    points = []
    for row in rows:
        preset, _, options = row["kind"].partition(" ")
        owner = "ours" if is_fibquant(preset) else row["engine"]
        if "exact" in options:
            owner += ", mode exact"
        if value := row.get(field):
            bits = bits_of(row["kind"], row["head_dim"], row.get("windows", [None]))
            points.append(Point(owner, bits, value, preset.removeprefix("fibquant_")))
    return points
