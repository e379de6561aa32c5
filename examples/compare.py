# SPDX-License-Identifier: Apache-2.0
"""What the examples share: codes beside scalar quantisation on any set of vectors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_fibquant.codec.codec import VectorCodec
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.layout import NORM_BYTES

CODES = (
    CodeSpec(8, 256, gain="mse"),
    CodeSpec(4, 256, gain="mse"),
    CodeSpec(4, 4096, folded=True, gain="mse"),
    CodeSpec(2, 256, gain="mse", storage="float16"),
    CodeSpec(2, 1024, folded=True, gain="mse", storage="float16"),
)
SCALAR_BITS = (2, 3, 4, 8)
NEIGHBOURS = 10


def scalar(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x `[n, d]` through evenly spaced levels of `bits` bits, with a float16 scale per vector."""
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).half().float().clamp(min=1e-12)
    return (x / scale).round().clamp(-top - 1, top) * scale


def nearest(queries: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    """Numbers of the k nearest rows of x to each query, int64 `[num_queries, k]`."""
    return torch.cdist(queries, x).topk(k, largest=False).indices


def compare(x: torch.Tensor, num_queries: int, k: int = NEIGHBOURS) -> list[dict[str, Any]]:
    """Codes and scalar quantisation of vectors: bytes, error and nearest-neighbour search.

    Args:
        x: float32 `[n, d]`; the last num_queries are queries and stay exact, the others are stored
            less their common mean, which search and error do not see.
        num_queries: below n.
        k: neighbours asked for.

    Returns:
        A row per format: name, bytes, effective_rate (bits per coordinate, norm or scale included),
        snr_db (of the centred vectors), recall (share of the exact k neighbours found among the
        k nearest decoded ones).
    """
    x = x - x[:-num_queries].mean(0)
    stored, queries = x[:-num_queries], x[-num_queries:]
    head_dim = x.shape[-1]
    exact = nearest(queries, stored, k)
    decoded = {}
    for spec in CODES:
        codec = VectorCodec.from_spec(spec, head_dim)
        size = spec.index_bytes(head_dim) + NORM_BYTES
        decoded[spec.name] = size, codec.decode(*codec.encode(stored))
    for bits in SCALAR_BITS:
        decoded[f"int{bits}"] = head_dim * bits // 8 + NORM_BYTES, scalar(stored, bits)
    rows = []
    for name, (size, y) in decoded.items():
        found = nearest(queries, y, k)
        recall = (found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean().item()
        snr = 10 * torch.log10(stored.square().sum() / (stored - y).square().sum()).item()
        rate = 8 * size / head_dim
        rows.append(dict(name=name, bytes=size, effective_rate=rate, snr_db=snr, recall=recall))
    return rows


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"{title}\n\n| format | bytes | bits / value | SNR, dB | recall@10 |")
    print("|---|---:|---:|---:|---:|")
    for r in sorted(rows, key=lambda r: (r["bytes"], r["name"])):
        print(
            f"| {r['name']} | {r['bytes']} | {r['effective_rate']:.2f} | {r['snr_db']:.1f} "
            f"| {r['recall']:.3f} |"
        )


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """SNR and recall against bits per value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, field, label in zip(
        axes, ("snr_db", "recall"), ("SNR (dB)", "recall@10"), strict=True
    ):
        for is_scalar, name, style in ((False, "FibQuant", "o-"), (True, "scalar", "s--")):
            points = sorted(
                (r["effective_rate"], r[field])
                for r in rows
                if r["name"].startswith("int") is is_scalar
            )
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set_xlabel("bits per value, norm or scale included")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def run(
    description: str,
    title: str,
    what: str,
    make: Callable[[int], torch.Tensor],
    arguments: list[str] | None,
) -> None:
    """An example's command line: compares vectors, prints the table, and plots if asked to.

    Args:
        description: the example's documentation, of which the first line is shown.
        title: the plot's.
        what: what the vectors are, for the table's title.
        make: makes so many vectors, float32 `[count, d]`.
        arguments: those of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--vectors", type=int, default=8000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    args = parser.parse_args(arguments)
    if args.vectors < NEIGHBOURS or args.queries < 1:
        parser.error(f"--vectors must be at least {NEIGHBOURS}, --queries at least 1")
    rows = compare(make(args.vectors + args.queries), args.queries)
    print_table(f"{args.vectors} {what}", rows)
    if args.plot:
        plot(title, rows, args.plot)
