# SPDX-License-Identifier: Apache-2.0
"""Building codebooks: from the spiral of source_law.py through Lloyd-Max to stored bytes.

Everything here is NumPy and deterministic: the same seed gives the same bytes on one machine.

Source: FibQuant (arXiv 2605.11478) for the initial book and multi-restart Lloyd-Max; sign-folded
books and the choice of the int8 scale are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_fibquant.codec.codebook import Codebook, dequantise, make_codebook
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.rotation import haar_matrix
from vllm_fibquant.codec.source_law import initial_codebook, sample_source

Progress = Callable[[int, int, float], None]
"""Called after every Lloyd step with (steps done, steps in all, MSE on the training samples)."""

# Products of so few multiply-adds leave scores in cache and keep OpenBLAS on one thread: its
# threads spin for longer than such a product takes, which on a busy machine costs minutes.
_PRODUCT_SIZE = 1 << 18
_MAX_HELD_OUT = 1 << 19  # the standard deviation of the MSE is then below 0.1 %
_CONVERGED = 1e-6  # relative fall of the MSE below which Lloyd stops


@dataclass(frozen=True)
class BuildOptions:
    """What the result depends on, besides the code.

    Attributes:
        seed: of NumPy's default generator; the same seed gives the same bytes on one machine.
        restarts: Lloyd runs; the first starts from the initial book, others from rotations of it.
        samples: training subvectors; None for `default_samples`.
        iterations: most Lloyd steps of one run.
    """

    seed: int = 0
    restarts: int = 4
    samples: int | None = None
    iterations: int = 100

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("restarts", 1), ("samples", 1), ("iterations", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(
                    f"build_codebook: {name} must be at least {least}, got {number}; "
                    f"leave it out for the default"
                )


SHIPPED_OPTIONS = BuildOptions(samples=1 << 19, iterations=150)
"""How the codebooks of the package are built: `codebook rebuild`."""


def default_samples(spec: CodeSpec) -> int:
    """Training subvectors: enough that centroids of few samples do not matter."""
    return min(max(1 << 18, 256 * spec.num_rows), 1 << 22)


def nearest(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest row of each sample; ties to the lowest index.

    Args:
        x: float32 `[n, k]`.
        rows: float32 `[num_rows, k]`.

    Returns:
        index int64 `[n]` and squared distance float32 `[n]`.
    """
    # A constant coordinate folds -|c|^2/2 into the product: one pass over the scores less.
    bias = -0.5 * np.square(rows).sum(1, keepdims=True)
    table = np.concatenate((rows, bias), 1).T
    padded = np.concatenate((x, np.ones((len(x), 1), np.float32)), 1)
    index = np.empty(len(x), np.int64)
    step = max(8, _PRODUCT_SIZE // table.size)
    for start in range(0, len(x), step):
        index[start : start + step] = (padded[start : start + step] @ table).argmax(1)
    return index, np.square(x - rows[index]).sum(1)


def lloyd(
    x: np.ndarray,
    rows: np.ndarray,
    iterations: int,
    rng: np.random.Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> np.ndarray:
    """Lloyd-Max: assign samples to the nearest row, move rows to their centroids, repeat.

    Args:
        x: training samples, float32 `[n, k]`.
        rows: start, float32 `[num_rows, k]`.
        iterations: most steps.
        rng: for the repair of empty cells.
        on_step: called with (step from 1, mean squared distance of a sample before the step).

    Returns:
        float32 `[num_rows, k]`.
    """
    previous = math.inf
    for step in range(1, iterations + 1):
        index, sq = nearest(x, rows)
        mean_sq = float(sq.mean(dtype=np.float64))
        if on_step:
            on_step(step, mean_sq)
        counts = np.bincount(index, minlength=len(rows))
        sums = np.stack([np.bincount(index, c, len(rows)) for c in x.T], 1)
        rows = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        if (counts == 0).any():
            rows = repair_empty_cells(rows, counts, np.bincount(index, sq, len(rows)), rng)
        elif previous - mean_sq < _CONVERGED * mean_sq:
            break
        previous = mean_sq
    return rows


def repair_empty_cells(
    rows: np.ndarray, counts: np.ndarray, distortion: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Give each empty cell half of the cell of highest distortion.

    Args:
        rows: float32 `[num_rows, k]`; those of empty cells are replaced.
        counts: int64 `[num_rows]`, samples of each cell.
        distortion: float64 `[num_rows]`, summed squared distance of each cell's samples.
        rng: for the direction of the split.

    Returns:
        float32 `[num_rows, k]`.
    """
    rows, counts, distortion = rows.copy(), counts.copy(), distortion.copy()
    for empty in np.flatnonzero(counts == 0):
        worst = int(distortion.argmax())
        spread = math.sqrt(distortion[worst] / max(counts[worst], 1))  # RMS distance to its row
        offset = rng.standard_normal(rows.shape[1])
        offset *= 0.5 * spread / np.linalg.norm(offset)
        rows[empty] = rows[worst] + offset
        rows[worst] -= offset
        counts[empty] = counts[worst] = counts[worst] // 2
        distortion[empty] = distortion[worst] = distortion[worst] / 2
    return rows


def round_rows(rows: np.ndarray, weights: np.ndarray, spec: CodeSpec) -> tuple[np.ndarray, float]:
    """Round a book to its stored precision.

    The one scale of an int8 table minimises the squared rounding error weighted by how often a row
    is used, which is the MSE that rounding adds to centroids. Few large rows may be clipped.

    Args:
        rows: float32 `[num_rows, k]`, magnitudes if folded.
        weights: float64 `[num_rows]`, share of samples of each row.
        spec: the code.

    Returns:
        table int8 or float16 `[num_rows, k]`, and the scale (a float32 value, 1.0 for float16).
    """
    if spec.storage == "float16":
        return rows.astype(np.float16), 1.0
    half, low = (0.5, 0) if spec.folded else (0.0, -127)

    def table_at(scale: np.float32) -> np.ndarray:
        return np.clip(np.rint(rows / scale - half), low, 127).astype(np.int8)

    def added(scale: np.float32) -> float:
        error = rows - dequantise(table_at(scale), scale, spec.folded)
        return float(weights @ np.square(error, dtype=np.float64).sum(1))

    widest = np.abs(rows).max() / (127 + half)
    scale = min((np.float32(widest * f) for f in np.linspace(0.6, 1.1, 501)), key=added)
    return table_at(scale), float(scale)


def build_codebook(
    spec: CodeSpec,
    head_dim: int,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> tuple[Codebook, bytes]:
    """Build the codebook of a code at a head_dim.

    Args:
        spec: the code; its gain plays no part.
        head_dim: d, a multiple of spec.subvec_dim.
        options: seed, restarts, samples, iterations.
        progress: called after every Lloyd step.

    Returns:
        The codebook, and the content of its file. Its provenance holds the options and the MSE on
        held-out samples of the initial, the refined and the rounded book.

    Raises:
        ValueError: subvec_dim does not divide head_dim.
    """
    spec.num_subvecs(head_dim)
    options = options or BuildOptions()
    count = options.samples or default_samples(spec)
    k = spec.subvec_dim
    seed = np.random.SeedSequence((options.seed, head_dim, k, spec.num_codewords, spec.folded))
    train_rng, test_rng, run_rng = (np.random.default_rng(s) for s in seed.spawn(3))

    def samples(rng: np.random.Generator, count: int) -> np.ndarray:
        x = sample_source(head_dim, k, count, rng)
        return np.abs(x) if spec.folded else x

    train = samples(train_rng, count)
    held_out = samples(test_rng, min(count, _MAX_HELD_OUT))

    def mse(rows: np.ndarray) -> float:
        return unit_mse(held_out, rows, head_dim)

    base = initial_codebook(head_dim, k, spec.num_rows)
    best: tuple[float, np.ndarray] | None = None
    mse_initial = math.nan
    total = options.restarts * options.iterations
    for restart in range(options.restarts):
        start = base if restart == 0 else base @ haar_matrix(k, run_rng).astype(np.float32)
        start = np.abs(start) if spec.folded else start
        done = restart * options.iterations

        def on_step(step: int, mean_sq: float, done: int = done) -> None:
            if progress:
                progress(done + step, total, mean_sq * head_dim / k)

        refined = lloyd(train, start, options.iterations, run_rng, on_step)
        if restart == 0:
            mse_initial = mse(start)
            best = mse_initial, start
        reached = mse(refined)
        if best is None or reached < best[0]:
            best = reached, refined
    if best is None:
        raise AssertionError("restarts is at least 1")
    mse_refined, rows = best

    weights = np.bincount(nearest(train, rows)[0], minlength=len(rows)) / count
    table, scale = round_rows(rows, weights, spec)
    provenance = {
        "seed": options.seed,
        "restarts": options.restarts,
        "samples": count,
        "iterations": options.iterations,
        "mse_initial": mse_initial,
        "mse_refined": mse_refined,
        "mse_rounded": mse(dequantise(table, np.float32(scale), spec.folded)),
    }
    return make_codebook(spec, head_dim, table, scale, provenance)


def unit_mse(x: np.ndarray, rows: np.ndarray, head_dim: int) -> float:
    """Mean squared error of a unit vector when samples x `[n, k]` are read as nearest rows."""
    return float(nearest(x, rows)[1].mean(dtype=np.float64)) * head_dim / x.shape[1]


def measure_mse(book: Codebook, samples: int = 1 << 18, seed: int = 1) -> float:
    """MSE of a finished book on fresh samples of the source."""
    rng = np.random.default_rng((seed, book.head_dim))
    x = sample_source(book.head_dim, book.spec.subvec_dim, samples, rng)
    x = np.abs(x) if book.spec.folded else x
    return unit_mse(x, book.rows.numpy(), book.head_dim)
