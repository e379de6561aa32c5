# SPDX-License-Identifier: Apache-2.0
"""Other KV cache formats, after their descriptions; no code is shared with them.

Where a description leaves room the choice that favours the format is taken, and said.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.evaluation.formats import Format

SCALE_BITS = 16
LLOYD_STEPS = 40
MAX_FIT_SAMPLES = 1 << 16


def affine(x: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """x after 2**width equal steps between least and greatest along `dim`, both in float16.

    A run of equal numbers comes back as that number in float16.
    """
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / (2**width - 1)).half().float()
    level = ((x - low) / step.clamp(min=1e-12)).round().clamp(0, 2**width - 1)
    return low + level * step


@dataclass(frozen=True)
class Int4PerToken(Format):
    """Asymmetric 4 bits with a step and a least value per token, head and side."""

    def bits(self, head_dim, context):
        return 4 + 2 * SCALE_BITS / head_dim

    def roundtrip(self, layer, keys, values, rotate):
        return affine(keys, 4, -1), affine(values, 4, -1)


@functools.lru_cache(maxsize=8)
def hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix of a power of two, its own inverse: float32
    `[size, size]`."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)


@dataclass(frozen=True)
class GgmlQ4(Format):
    """q4_0 of ggml: runs of 32 coordinates, whose signed extreme becomes level 0 of 16.

    `rotated` is how llama.cpp stores quantised caches since its pull request 21038, where head_dim
    is a multiple of 64: keys after a Hadamard matrix of the largest power of two that divides
    head_dim, values after one of 64.
    """

    rotated: bool = False
    run: ClassVar[int] = 32

    def bits(self, head_dim, context):
        return 4 + SCALE_BITS / self.run

    def roundtrip(self, layer, keys, values, rotate):
        if not self.rotated or keys.shape[-1] % 64:
            return self.runs(keys), self.runs(values)
        head_dim = keys.shape[-1]
        return self._turned(keys, head_dim & -head_dim), self._turned(values, 64)

    def _turned(self, x: torch.Tensor, size: int) -> torch.Tensor:
        matrix = hadamard(size)
        coded = self.runs((x.unflatten(-1, (-1, size)) @ matrix).flatten(-2))
        return (coded.unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    def runs(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[..., n]`, n a multiple of 32, to what its runs decode to."""
        runs = x.unflatten(-1, (-1, self.run))
        extreme = runs.gather(-1, runs.abs().argmax(-1, keepdim=True))
        scale = extreme / -8
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        level = (runs * inverse + 8.5).floor().clamp(0, 15)  # with the scale before rounding
        return ((level - 8) * scale.half().float()).flatten(-2)


@dataclass(frozen=True)
class Kivi(Format):
    """KIVI (arXiv 2402.02750, algorithm 1) with groups of 32 and a residual of R tokens.

    Keys: per channel over groups of 32 tokens; the newest (p mod R) + 1 keys of a query at p stay
    uncompressed, until R of them are coded together. Values: per token over groups of 32
    channels; the newest R stay uncompressed beside the query's own. R = 0 is the least the format
    allows: an unfinished group of keys stays uncompressed, every value is coded at once.
    """

    width: int
    residual: int
    group: ClassVar[int] = 32

    @property
    def key_residual(self) -> int:
        return max(self.residual, self.group)

    def bits(self, head_dim, context):
        coded = self.width + 2 * SCALE_BITS / self.group
        raw_keys = min((self.key_residual + 1) / 2, context)  # mean over p
        raw_values = min(self.residual + 1, context) if self.residual else 0
        return coded + (16 - coded) * (raw_keys + raw_values) / (2 * context)

    def roundtrip(self, layer, keys, values, rotate):
        whole = keys.shape[1] // self.group * self.group
        groups = keys[:, :whole].unflatten(1, (-1, self.group))
        coded = affine(groups, self.width, 2).flatten(1, 2)
        runs = values.unflatten(-1, (-1, self.group))
        # Keys behind the last whole group are read uncompressed by every query there is.
        return torch.cat([coded, keys[:, whole:]], 1), affine(runs, self.width, -1).flatten(-2)

    def key_start(self, positions):
        return positions // self.key_residual * self.key_residual

    def value_start(self, positions):
        if not self.residual:
            return positions + 1
        return (positions - self.residual).clamp(min=0)


@functools.lru_cache(maxsize=32)
def lloyd_max_levels(head_dim: int, num_levels: int) -> torch.Tensor:
    """Levels of the Lloyd-Max quantiser of one coordinate of a uniform unit vector, ascending.

    Source: density (1 - t^2)^((d - 3) / 2), integrated on a grid.

    Returns:
        float32 `[num_levels]`.
    """
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    density = (1 - t * t) ** ((head_dim - 3) / 2)
    mass, moment = density.cumsum(0), (density * t).cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64)
    last = torch.tensor([len(t) - 1])
    spread = 3 / math.sqrt(head_dim)
    levels = torch.linspace(-spread, spread, num_levels, dtype=torch.float64)
    for _ in range(500):
        cuts = torch.searchsorted(t, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([cuts - 1, last])
        new = moment[ends].diff(prepend=zero) / mass[ends].diff(prepend=zero)
        done = (new - levels).abs().max() < 1e-7
        levels = new
        if done:
            break
    return levels.float()


@dataclass(frozen=True)
class TurboQuant(Format):
    """TurboQuant (arXiv 2504.19874), its MSE form: the unit vector is rotated, each coordinate
    takes its nearest Lloyd-Max level, the norm is float16; `corrected` divides the norm by the
    length of the decoded direction.
    """

    width: int
    corrected: bool = False

    def bits(self, head_dim, context):
        return self.width + SCALE_BITS / head_dim

    def roundtrip(self, layer, keys, values, rotate):
        return self.vectors(keys), self.vectors(values)

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[..., d]` to what its code decodes to."""
        head_dim = x.shape[-1]
        levels = lloyd_max_levels(head_dim, 2**self.width)
        rotation = make_rotation(head_dim)
        norm = x.norm(dim=-1, keepdim=True)
        unit = rotation.apply(x / norm.clamp(min=1e-20))
        decoded = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        if self.corrected:
            norm = norm / decoded.norm(dim=-1, keepdim=True)
        return rotation.inverse(decoded) * norm.half().float()


def fit_levels(x: torch.Tensor, num_levels: int) -> torch.Tensor:
    """Levels of a one-dimensional k-means of x from its quantiles, ascending: `[num_levels]`."""
    sample = x.flatten()
    sample = sample[:: max(1, sample.numel() // MAX_FIT_SAMPLES)][:MAX_FIT_SAMPLES].contiguous()
    levels = torch.quantile(sample, (torch.arange(num_levels) + 0.5) / num_levels)
    for _ in range(LLOYD_STEPS):
        cell = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        count = torch.bincount(cell, minlength=num_levels)
        total = torch.zeros_like(levels).index_add_(0, cell, sample)
        levels = torch.where(count > 0, total / count.clamp(min=1), levels)
    return levels


def nearest_level(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


@dataclass(frozen=True)
class KVQuant(Format):
    """After KVQuant (arXiv 2401.18079): non-uniform levels, outliers kept apart.

    Keys before the rotary embedding, each channel scaled by the range that leaves out the share
    `outliers` of the calibration text; values per token over all heads, scaled by the range that
    leaves out its own outliers; levels per layer and side by k-means on the calibration text
    (theirs weigh it by Fisher information; ours do not); the first token uncompressed.
    """

    width: int
    outliers: float = 0.01
    num_first: ClassVar[int] = 1
    _tables: dict[int, tuple[torch.Tensor, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def bits(self, head_dim, context):
        # An outlier costs a 16-bit value and a 16-bit index. Scales per token are shared by all
        # heads and left out: 32 bits a token.
        stored = self.width + 32 * self.outliers
        return stored + (16 - stored) * min(self.num_first, context) / context

    def fit(self, layers, rotations):
        for index, (_, keys, values) in enumerate(layers):
            before = rotations[index](keys, True)[:, self.num_first :]
            ends = torch.tensor([self.outliers / 2, 1 - self.outliers / 2])
            low, high = torch.quantile(before, ends, dim=1, keepdim=True)
            scaled = _scale(before, low, high)
            key_levels = fit_levels(scaled[scaled.abs() <= 1], 2**self.width)
            flat = _by_token(values[:, self.num_first :])
            scaled = _scale(flat, *self._token_range(flat))
            value_levels = fit_levels(scaled[scaled.abs() <= 1], 2**self.width)
            self._tables[index] = low, high, key_levels, value_levels

    def roundtrip(self, layer, keys, values, rotate):
        if layer not in self._tables:
            raise ValueError("KVQuant: must be fitted first, got no tables; call fit")
        low, high, key_levels, value_levels = self._tables[layer]
        coded = rotate(self._coded(rotate(keys, True), low, high, key_levels), False)
        flat = _by_token(values)
        flat = self._coded(flat, *self._token_range(flat), value_levels)
        return coded, flat.unflatten(-1, (values.shape[0], -1)).transpose(0, 1)

    def _token_range(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest of each token without its outliers: `[num_tokens, 1]`."""
        each = max(1, math.floor(self.outliers * flat.shape[-1] / 2))
        ascending = flat.sort(-1).values
        return ascending[:, each : each + 1], ascending[:, -each - 1 : flat.shape[-1] - each]

    @staticmethod
    def _coded(x, low, high, levels):
        scaled = _scale(x, low, high)
        decoded = nearest_level(scaled, levels) * _half(low, high) + (low + high) / 2
        return torch.where(scaled.abs() <= 1, decoded, x)


def _half(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return ((high - low) / 2).clamp(min=1e-12)


def _scale(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """x with low at -1 and high at 1."""
    return (x - (low + high) / 2) / _half(low, high)


def _by_token(values: torch.Tensor) -> torch.Tensor:
    """`[num_kv_heads, num_tokens, d]` to `[num_tokens, num_kv_heads * d]`."""
    return values.transpose(0, 1).flatten(1)
