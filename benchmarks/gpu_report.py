# SPDX-License-Identifier: Apache-2.0
"""Tables and a plot from the lines that benchmarks/gpu_proof.py wrote.

    python -m benchmarks.gpu_report gpu.jsonl --out docs/results/gpu.md --image docs/images/gpu.png

Times of bfloat16 and of fp8 are those of the fastest attention over it that ran in that case.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.plot import COLOURS, rows_of

BF16 = ("sdpa", "bf16", "flashinfer", "flash_attn", "xformers", "vllm_flash", "unified")
FP8 = ("fp8", "vllm_flash_fp8", "unified_fp8")
OURS = ("cuda", "triton")
# (what, preset, batch, context, column, at least): targets at head_dim 128, group 4.
TARGETS = (
    ("2 bits, batch 32 x 32k: 5 times bf16", "fibquant_2bit", 32, 32768, "vs_bf16", 5.0),
    ("2 bits, batch 32 x 32k: 2.5 times fp8", "fibquant_2bit", 32, 32768, "vs_fp8", 2.5),
    ("4 bits, batch 32 x 32k: 3.4 times bf16", "fibquant_4bit", 32, 32768, "vs_bf16", 3.4),
    ("2 bits, batch 32 x 32k: 70 % of the roofline", "fibquant_2bit", 32, 32768, "roofline", 0.7),
    ("4 bits, batch 32 x 32k: 70 % of the roofline", "fibquant_4bit", 32, 32768, "roofline", 0.7),
    ("k5v3, batch 1 x 4k: not slower than bf16", "fibquant_k5v3", 1, 4096, "vs_bf16", 1.0),
)
TARGET_SHAPE = (128, 8, 4)

Row = dict[str, Any]


def compared(rows: list[Row]) -> list[Row]:
    """One row per case that was timed: our faster kernel beside the others."""
    found = []
    for row in rows:
        ours = {name: row[f"ms_{name}"] for name in OURS if f"ms_{name}" in row}
        if "shape" not in row or not ours:
            continue
        kernel = min(ours, key=lambda name: ours[name])
        bf16 = {name: row[f"ms_{name}"] for name in BF16 if f"ms_{name}" in row}
        fp8 = [row[f"ms_{name}"] for name in FP8 if f"ms_{name}" in row]
        best = min(bf16, key=lambda name: bf16[name]) if bf16 else None
        ms = ours[kernel]
        found.append({
            "shape": tuple(row["shape"]), "batch": row["batch"], "context": row["context"],
            "preset": row["preset"], "kernel": kernel, "ms": ms, "bf16": best,
            "vs_bf16": bf16[best] / ms if best else None,
            "vs_fp8": min(fp8) / ms if fp8 else None,
            "vs_turboquant": row["ms_turboquant"] / ms if "ms_turboquant" in row else None,
            "roofline": row.get(f"roofline_{kernel}"),
        })  # fmt: skip
    return found


def table(heads: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]


def markdown(rows: list[Row]) -> str:
    cases = compared(rows)
    hardware = sorted({str(r["device"]) for r in rows if "device" in r})
    versions = sorted({str(r["versions"]) for r in rows if "versions" in r})
    lines = ["# Measured on a GPU", "", f"{', '.join(hardware)}; {'; '.join(versions)}.", ""]

    def times(x: float | None) -> str:
        return "–" if x is None else f"{x:.2f}x"

    lines += ["## Targets", ""]
    cells = []
    for what, preset, batch, context, column, least in TARGETS:
        at = [
            c for c in cases
            if (c["shape"], c["preset"]) == (TARGET_SHAPE, preset)
            and (c["batch"], c["context"]) == (batch, context) and c[column] is not None
        ]  # fmt: skip
        value = at[-1][column] if at else None
        verdict = "not measured" if value is None else "met" if value >= least else "missed"
        cells.append([what, "–" if value is None else f"{value:.2f}", verdict])
    lines += table(["target, d=128, 8 KV heads x 4", "measured", ""], cells)

    lines += ["", "## Decode attention", ""]
    lines += table(
        ["d, KV heads x queries", "batch", "context", "preset", "kernel", "us", "vs bf16",
         "fastest bf16", "vs fp8", "vs TurboQuant", "roofline"],
        [
            ["{}, {} x {}".format(*c["shape"]), str(c["batch"]), str(c["context"]),
             f"`{c['preset']}`", c["kernel"], f"{c['ms'] * 1000:.1f}", times(c["vs_bf16"]),
             c["bf16"] or "–", times(c["vs_fp8"]), times(c["vs_turboquant"]),
             "–" if c["roofline"] is None else f"{c['roofline']:.0%}"]
            for c in cases
        ],
    )  # fmt: skip
    lines += _batches(rows) + _engines(rows)
    eager = sorted(
        {k.removeprefix("eager_") for row in rows for k in row if k.startswith("eager_")}
    )
    if eager:
        lines += [
            "",
            f"Timed as calls, not as CUDA graphs, which they do not allow: {', '.join(eager)}.",
        ]
    skipped = sorted({
        f"{key.removeprefix('skipped_')}: {text}"
        for row in rows for key, text in row.items() if key.startswith("skipped_")
    })  # fmt: skip
    lines += ["", "Did not run:", "", *(f"- {text}" for text in skipped)] if skipped else []

    rates = [row for row in rows if "rate" in row]
    lines += ["", "## Rates", ""]
    lines += table(
        ["rate", "measured", "predicted"],
        [
            [r["rate"], f"{r['gb_per_s']:.0f} GB/s" if "gb_per_s" in r
             else f"{r['per_clock_and_sm']:.3f} a clock", str(r.get("predicted", "–"))]
            for r in rates if r["rate"] != "encode"
        ],
    )  # fmt: skip
    lines += ["", "Encoding keys and values of 8 KV heads, d=128:", ""]
    lines += table(
        ["tokens", "preset", "us"],
        [[str(r["tokens"]), r["preset"], f"{r['us']:.1f}"] for r in rates if "us" in r],
    )
    return "\n".join(lines) + "\n"


def _batches(rows: list[Row]) -> list[str]:
    """Prompts, chunks and mixed batches: milliseconds."""
    mine = [row for row in rows if "batches" in row]
    if not mine:
        return []
    names = list(dict.fromkeys(k[3:] for row in mine for k in row if k.startswith("ms_")))
    cells = [
        [row["batches"], "{}, {} x {}".format(*row["of"]),
         *(f"{row[f'ms_{n}']:.3f}" if f"ms_{n}" in row else "–" for n in names)]
        for row in mine
    ]  # fmt: skip
    heads = ["batch", "d, KV heads x queries", *names]
    return ["", "## Prompts and mixed batches", "", "Milliseconds.", "", *table(heads, cells)]


def _engines(rows: list[Row]) -> list[str]:
    """Servers: milliseconds."""
    mine = [row for row in rows if "p50_ttft_ms" in row]
    if not mine:
        return []
    cells = [
        [row["engine"], str(row["concurrency"]), str(row["cache_tokens"]),
         *(f"{row[f'p50_{m}_ms']:.1f}, {row[f'p95_{m}_ms']:.1f}" for m in ("ttft", "itl")),
         f"{row['output_tokens_per_s']:.0f}"]
        for row in mine
    ]  # fmt: skip
    heads = ["cache", "requests at once", "cache holds (tokens)", "first token (ms) p50, p95",
             "between tokens (ms) p50, p95", "tokens / s"]  # fmt: skip
    return ["", "## Servers", "", *table(heads, cells)]


def draw(rows: list[Row]):
    """Speed of decode attention over the fastest bfloat16 one, by context; a panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [c for c in compared(rows) if c["vs_bf16"] is not None]
    shapes = sorted({c["shape"] for c in cases})
    batches = sorted({c["batch"] for c in cases})
    figure, axes = plt.subplots(
        len(batches), len(shapes), figsize=(4 * len(shapes), 3 * len(batches)), squeeze=False
    )
    for line, batch in zip(axes, batches, strict=True):
        for axis, shape in zip(line, shapes, strict=True):
            mine = [c for c in cases if (c["shape"], c["batch"]) == (shape, batch)]
            for name in COLOURS:
                points = sorted((c["context"], c["vs_bf16"]) for c in mine if c["preset"] == name)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
            axis.axhline(1, color="#555555", linestyle="--", label="fastest bf16")
            axis.set_xscale("log", base=2)
            axis.set_title("d={}, {} x {}, batch ".format(*shape) + str(batch), fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("context (tokens)")
    figure.supylabel("speed of decode attention vs bf16")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report")
    parser.add_argument("results", type=Path, help="jsonl of benchmarks.gpu_proof")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.md"))
    parser.add_argument("--image", type=Path, default=Path("docs/images/gpu.png"))
    args = parser.parse_args()
    rows = rows_of(args.results)
    if not compared(rows):
        parser.error(f"{args.results} must hold lines of `gpu_proof speed`, got none with times")
    args.out.write_text(markdown(rows))
    draw(rows).savefig(args.image, dpi=120, bbox_inches="tight")
    print(f"wrote {args.out} and {args.image}")


if __name__ == "__main__":
    main()
