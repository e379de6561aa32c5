# SPDX-License-Identifier: Apache-2.0
"""Keys in coordinates that matter unequally, and a code that spends its bits accordingly.

What a key's error costs is decided by the queries: E<q, k - k'>^2 = |A (k - k')|^2, A the square
root of the queries' second moment. Principal axes of A times the keys' covariance times A are the
coordinates in which both are simple, D^2 the variances along them:

    U D^2 U^T = A cov A,   z = D^-1 U^T A (k - mean),   w = D U^T A^-1 q,   <w, z> = <q, k - mean>

z is white, so a subvector of it has the law that our codebooks are made for, and an error of
coordinate i costs D_i^2. D falls steeply. So subvectors are short, and their indices precise, where
D is large; every index is one byte. At 2 bits half of a key's bytes are for subvectors of 2
coordinates, a quarter for 4, a quarter for 8, in the order of D; likewise at one bit, which leaves
half of the coordinates, those that matter least, without a code: they decode to the mean. Above 2
bits every coordinate is in a subvector of 2 or of 4.

Within the coordinates of one subvector length a fixed rotation evens out what is left of D's fall.

Source: ours; the Karhunen-Loeve transform and bit allocation by variance are textbook results.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from vllm_fibquant.codec.codebook import Codebook, load_codebook
from vllm_fibquant.codec.codec import MAX_NORM
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.rotation import haar_matrix
from vllm_fibquant.codec.search import nearest_rows

RUN_CODES = (
    CodeSpec(2, 256, storage="float16"),
    CodeSpec(4, 256),
    CodeSpec(8, 256),
)
"""The codes of subvectors, in the order of a record's bytes."""

SHRINKAGE = 0.02
"""How far both second moments are drawn to a multiple of the identity."""

_DUAL_STEPS = 4  # leave the rounding of float64, of errors that begin at a few percent

_MULTIPLE = 16  # of num_coded, as kernels want it
_MIN_NORMAL = torch.finfo(torch.float32).tiny


def run_lengths(index_bytes: int, head_dim: int) -> tuple[int, int, int]:
    """How many subvectors of 2, 4 and 8 coordinates a key of this many index bytes has."""
    if 4 * index_bytes <= head_dim:
        short, long = index_bytes // 2, index_bytes // 4
        return short, index_bytes - short - long, long
    # Every coordinate in a subvector of 2 or of 4, and every byte used but for an odd rest.
    pairs = min(2 * index_bytes - head_dim // 2, head_dim // 2)
    return pairs, (head_dim - 2 * pairs) // 4, 0


def num_coordinates(lengths: tuple[int, int, int]) -> int:
    """Coordinates that are coded."""
    return sum(n * spec.subvec_dim for n, spec in zip(lengths, RUN_CODES, strict=True))


def transform_problem(key: CodeSpec, head_dim: int) -> str | None:
    """Why keys of this code cannot be transformed, or None."""
    index_bytes = key.index_bytes(head_dim)
    if index_bytes < 4 or 2 * index_bytes > head_dim:
        return (
            f"keys must have at most 4 bits per coordinate to be transformed, got {key.rate:g}; "
            'use "calibrate": "means", or a preset such as fibquant_3bit or fibquant_k2v3'
        )
    return None


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """The transform of the keys of some heads, and the product code of what it makes of them.

    Attributes:
        key_matrix: float32 [num_kv_heads, num_coded, head_dim], contiguous: z = key_matrix k, its
            last rows 0 where num_coded was rounded up. Its numbers are bfloat16's: kernels that
            encode one token read it for that token alone, and so half as many bytes.
        query_matrix: as key_matrix: <query_matrix q, z> is the score of k.
        weight: float32 [num_kv_heads, num_coded], what an error of each coordinate costs.
        index_bytes: bytes of a key's indices.
    """

    key_matrix: torch.Tensor
    query_matrix: torch.Tensor
    weight: torch.Tensor
    index_bytes: int

    @property
    def num_coded(self) -> int:
        """Coordinates of z, a multiple of 16."""
        return self.key_matrix.shape[1]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Subvectors of each of `RUN_CODES`."""
        return run_lengths(self.index_bytes, self.key_matrix.shape[2])

    @property
    def source_scale(self) -> float:
        """The length that codebooks expect of the coded coordinates of a unit vector."""
        return math.sqrt(num_coordinates(self.lengths) / self.key_matrix.shape[2])

    @functools.cached_property
    def codebooks(self) -> tuple[Codebook, ...]:
        """The codebook of each of `RUN_CODES`."""
        return tuple(load_codebook(spec, self.key_matrix.shape[2]) for spec in RUN_CODES)

    def first_heads(self, num_kv_heads: int) -> KeyTransform:
        """The transform of the first `num_kv_heads` heads."""
        n = num_kv_heads
        return KeyTransform(
            self.key_matrix[:n], self.query_matrix[:n], self.weight[:n], self.index_bytes
        )

    def encode(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes keys without their mean.

        Zero vectors, and those with a NaN or an infinity, have norm 0 and indices 0.

        Args:
            key: float32 [..., num_kv_heads, head_dim].

        Returns:
            indices uint8 [..., num_kv_heads, index_bytes], norms float16 [..., num_kv_heads].
        """
        peak = key.abs().amax(-1, keepdim=True)
        usable = (peak >= _MIN_NORMAL) & (peak < torch.inf)
        scaled = torch.where(usable, key / peak, 0.0)
        z = torch.einsum("hcd,...hd->...hc", self.key_matrix, scaled)
        length = z.square().sum(-1, keepdim=True).sqrt()
        usable &= length > 0
        y = z / torch.where(usable, length, 1.0) * self.source_scale
        indices, directions = [], []
        begin = 0
        for book, count in zip(self.codebooks, self.lengths, strict=True):
            end = begin + count * book.spec.subvec_dim
            subvecs = y[..., begin:end].reshape(-1, book.spec.subvec_dim)
            index = nearest_rows(subvecs, book.rows)
            indices.append(index.view(*y.shape[:-1], count))
            directions.append(book.rows[index].view(*y.shape[:-1], -1))
            begin = end
        v = torch.cat(directions, -1)
        w, y = self.weight[:, :begin], y[..., :begin]
        gain = (w * y * v).sum(-1).clamp(min=0) / (w * v * v).sum(-1).clamp(min=1e-12)
        norm = torch.where(usable, (peak * length).clamp(max=1e30), 0.0).squeeze(-1)
        norms = (norm * gain / self.source_scale).clamp(max=MAX_NORM).to(torch.float16)
        return torch.where(usable, torch.cat(indices, -1), 0).to(torch.uint8), norms

    def decode(
        self, indices: torch.Tensor, norms: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Keys without their mean, in the model's basis: [..., num_kv_heads, head_dim] of dtype."""
        runs = zip(self.codebooks, indices.long().split(self.lengths, -1), strict=True)
        v = torch.cat([book.rows[index].flatten(-2) for book, index in runs], -1)
        z = norms.to(dtype).unsqueeze(-1) * v.to(dtype)
        matrix = self.query_matrix[:, : v.shape[-1]].to(dtype)
        return torch.einsum("hcd,...hc->...hd", matrix, z)


def make_transform(
    key_covariance: torch.Tensor, query_moment: torch.Tensor, index_bytes: int
) -> KeyTransform:
    """The transform that these statistics ask for.

    Args:
        key_covariance, query_moment: float32 [num_kv_heads, head_dim, head_dim].
        index_bytes: bytes of a key's indices.
    """
    queries = _shrink(query_moment)
    # A and its inverse, both from eigenvectors: on some CPUs LU of matrices this large, which
    # torch.linalg.inv does, fails with several threads.
    root, inverse_root = _power(queries, 0.5), _power(queries, -0.5)
    variances, axes = torch.linalg.eigh(root @ _shrink(key_covariance) @ root)
    # eigh gives ascending variances, and each axis with either sign.
    variances, axes = variances.flip(-1).clamp(min=1e-20), axes.flip(-1)
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    axes = axes * largest.sign()
    deviation = variances.sqrt().unsqueeze(-1)  # [h, d, 1]
    key_matrix = axes.transpose(-1, -2) @ root / deviation
    query_matrix = axes.transpose(-1, -2) @ inverse_root * deviation

    rows_key, rows_query, rows_weight = [], [], []
    begin = 0
    lengths = run_lengths(index_bytes, key_covariance.shape[-1])
    for spec, count in zip(RUN_CODES, lengths, strict=True):
        size = count * spec.subvec_dim
        if size == 0:
            continue
        run = slice(begin, begin + size)
        mix = torch.from_numpy(haar_matrix(size, np.random.default_rng(size)))
        rows_key.append(mix @ key_matrix[:, run])
        rows_query.append(mix @ query_matrix[:, run])
        rows_weight.append(variances[:, run].mean(-1, keepdim=True).expand(-1, size))
        begin += size
    padding = -begin % _MULTIPLE
    key_rows = torch.cat(rows_key, 1).bfloat16().double()
    query_rows = _made_dual(torch.cat(rows_query, 1), key_rows)
    weight = torch.cat(rows_weight, 1)
    weight = weight / weight.amax(-1, keepdim=True)
    pad = torch.nn.functional.pad
    return KeyTransform(
        pad(key_rows, (0, 0, 0, padding)).float().contiguous(),
        pad(query_rows, (0, 0, 0, padding)).float().contiguous(),
        pad(weight, (0, padding)).float().contiguous(),
        index_bytes,
    )


def _made_dual(query_rows: torch.Tensor, key_rows: torch.Tensor) -> torch.Tensor:
    """The rows near query_rows whose products with key_rows are 1 for a row's own and else 0:
    rounding the one of two inverses must not change what a score is.

    Newton's steps, each of which squares what is left of the error.
    """
    one = torch.eye(key_rows.shape[1], dtype=key_rows.dtype)
    for _ in range(_DUAL_STEPS):
        query_rows = query_rows - (key_rows @ query_rows.mT - one).mT @ query_rows
    return query_rows


def _shrink(moment: torch.Tensor) -> torch.Tensor:
    """Second moments drawn to a multiple of the identity, float64: then they can be inverted."""
    moment = moment.double()
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-12)
    return (1 - SHRINKAGE) * moment + SHRINKAGE * level * torch.eye(moment.shape[-1]).double()


def _power(moment: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    powers = torch.diag_embed(values.clamp(min=1e-20) ** exponent)
    return vectors @ powers @ vectors.transpose(-1, -2)
