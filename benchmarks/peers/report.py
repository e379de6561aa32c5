# SPDX-License-Identifier: Apache-2.0
"""The table in docs/peers.md and its plot, from what `make peers` measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import ENGINES
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

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
COLOURS = {"llama.cpp": "#8c564b", "OpenVINO": "#9467bd", "vLLM": "#555555", "ours": "#2ca02c"}


def bits_of(kind: str, head_dim: int) -> float:
    """Bits of a value in a cache of CONTEXT tokens, everything stored counted."""
    preset, _, options = kind.partition(" ")
    if is_fibquant(preset):
        parsed = parse_options(preset, {"fibquant": json.loads(options) if options else {}})
        coded = preset_layout(parsed.preset, head_dim).effective_rate
        return coded + 16 * min(parsed.num_copies, CONTEXT) / CONTEXT
    if kind in OPENVINO:
        bits, beside = OPENVINO[kind]
        return bits + beside / head_dim
    return BITS[kind]


def label_of(row: dict[str, Any]) -> str:
    kind = re.sub(r' \{"mode": "(\w+)"\}', r", mode \1", row["kind"])
    return f"`{kind}`" if ", " not in kind else "`" + kind.replace(", ", "`, ", 1)


def newest(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last result of each thing measured."""
    return {(r["bench"], r["engine"], r["kind"], r.get("context")): r for r in rows}


def table(rows: list[dict[str, Any]]) -> str:
    found = newest(rows)
    contexts = sorted({row["context"] for row in rows if row["bench"] == "speed"})
    head = [
        "engine",
        "cache",
        "bits a value",
        "bytes a token",
        "ΔPPL",
        "KL",
        "KL of one position in a thousand",
    ]
    head += [f"tokens/s at {context:,}" for context in contexts]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    kinds = dict.fromkeys((engine, kind) for _, engine, kind, _ in found)
    order = [(name, kind) for name, engine in ENGINES.items() for kind in engine.KINDS]
    for engine, kind in sorted(kinds, key=order.index):
        quality = found.get(("quality", engine, kind, None))
        speeds = [found.get(("speed", engine, kind, context)) for context in contexts]
        any_row = quality or next(row for row in speeds if row)
        bits = bits_of(kind, any_row["head_dim"])
        size = bits * any_row["head_dim"] * any_row["vectors_per_token"] / 8
        cells = [engine, label_of(any_row), f"{bits:.2f}", f"{size:,.0f}"]
        if quality is None:
            cells += ["", "", ""]
        elif kind == quality["against"]:
            cells += ["0", "0", "0"]
        else:
            cells += [
                f"{quality['delta_ppl']:+.1%}",
                f"{quality['kl']:.4f}",
                f"{quality['kl_999']:.2f}",
            ]
        cells += [f"{row['tokens_per_second']:.1f}" if row else "" for row in speeds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(results: Path, page: Path, image: Path) -> None:
    """Puts the table of `results` between the marks in `page`, and draws `image`."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")
    draw(rows, image)


def draw(rows: list[dict[str, Any]], image: Path) -> None:
    """KL against bits a value, and tokens per second at the longest context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = newest(rows)
    contexts = [row["context"] for row in rows if row["bench"] == "speed"]
    figure, axes = plt.subplots(
        1, 2 if contexts else 1, figsize=(11 if contexts else 6, 4), squeeze=False
    )
    panels = [("quality", None, "kl", "mean KL, nats")]
    if contexts:
        text = f"decode, tokens/s at {max(contexts):,} tokens"
        panels.append(("speed", max(contexts), "tokens_per_second", text))
    for axis, (bench, context, field, text) in zip(axes[0], panels, strict=False):
        groups: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
        for (of, engine, kind, at), row in found.items():
            if of != bench or at != context or row[field] == 0:
                continue
            owner = "ours" if is_fibquant(kind.split(" ")[0]) else engine
            group = owner, "exact" if "exact" in kind else ""
            groups.setdefault(group, []).append((bits_of(kind, row["head_dim"]), row[field], kind))
        for (owner, mode), points in groups.items():
            points.sort()
            x, y, kinds = zip(*points, strict=True)
            label = f"{owner}, mode {mode}" if mode else owner
            axis.plot(x, y, "s--" if mode else "o-", color=COLOURS[owner], label=label)
            for at_x, at_y, kind in points:
                short = kind.split(" ")[0].removeprefix("fibquant_")
                axis.annotate(
                    short,
                    (at_x, at_y),
                    textcoords="offset points",
                    xytext=(5, 4 if owner != "OpenVINO" else -10),
                    fontsize=7,
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        if bench == "quality":
            axis.set_yscale("log")
        axis.set_xlabel("bits a value, everything stored counted")
        axis.set_ylabel(text)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120, bbox_inches="tight")
