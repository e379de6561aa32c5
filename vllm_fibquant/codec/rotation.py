# SPDX-License-Identifier: Apache-2.0
"""The shared orthogonal matrix that makes every vector look alike.

A rotated unit vector is close to uniform on the sphere whatever the model, so one codebook serves
all layers and heads. Attention never undoes the rotation of keys: a query is rotated instead, and
the output of attention is un-rotated once.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """Multiply by the Sylvester-ordered Hadamard matrix of +-1, in d log2(d) additions.

    The butterfly runs over strides 1, 2, 4, ..., d/2; kernels use the same order.

    Args:
        x: float32 `[..., d]`, d a power of two.

    Returns:
        float32 `[..., d]`, not normalised: applying it twice multiplies by d.
    """
    head_dim = x.shape[-1]
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(
            f"hadamard_transform: the last axis of x must be a power of two, got {head_dim}; "
            "use a dense rotation"
        )
    y = x
    stride = 1
    while stride < head_dim:
        pairs = y.reshape(*x.shape[:-1], head_dim // (2 * stride), 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2)
        stride *= 2
    return y.reshape(x.shape)


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map of head_dim coordinates, the same in every process with the same seed.

    Attributes:
        head_dim: d, coordinates of one vector.
        seed: seed of NumPy's default generator.
        kind: "hadamard" where d is a power of two (y = H (signs * x) / sqrt(d)), else "dense"
            (y = matrix @ x).
        signs: float32 `[d]` of +-1; all ones for a dense rotation.
        matrix: float32 `[d, d]`, contiguous: the whole map, for either kind.

    Both are on the CPU, whatever torch's default device and dtype are: vLLM builds models with the
    GPU as default device and the model's dtype as default dtype.
    """

    head_dim: int
    seed: int
    kind: Literal["hadamard", "dense"]
    signs: torch.Tensor
    matrix: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate.

        Args:
            x: any float dtype `[..., d]`.

        Returns:
            float32 `[..., d]`.
        """
        x = self._checked("apply", x)
        if self.kind == "hadamard":
            return hadamard_transform(x * self.signs.to(x.device)) / math.sqrt(self.head_dim)
        return x @ self.matrix.T.to(x.device)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Rotate back: the transpose of `apply`.

        Args:
            y: any float dtype `[..., d]`.

        Returns:
            float32 `[..., d]`.
        """
        y = self._checked("inverse", y)
        if self.kind == "hadamard":
            return hadamard_transform(y) / math.sqrt(self.head_dim) * self.signs.to(y.device)
        return y @ self.matrix.to(y.device)

    @property
    def digest(self) -> str:
        """SHA-256 of the matrix (little-endian float32), hexadecimal."""
        return hashlib.sha256(self.matrix.numpy().astype("<f4").tobytes()).hexdigest()

    def _checked(self, function: str, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.head_dim:
            raise ValueError(
                f"Rotation.{function}: the last axis must be head_dim {self.head_dim}, "
                f"got shape {tuple(x.shape)}; make a rotation for this head_dim"
            )
        return x.float()


def haar_matrix(size: int, rng: np.random.Generator) -> np.ndarray:
    """A Haar-distributed orthogonal matrix, float64 `[size, size]`."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    # QR fixes q only up to column signs; a positive diagonal of r makes q unique, hence Haar.
    return q * np.sign(np.diag(r))


@functools.lru_cache(maxsize=64)
def make_rotation(head_dim: int, seed: int = 0) -> Rotation:
    """The rotation of `head_dim` coordinates with this seed (cached).

    Args:
        head_dim: d, at least 1.
        seed: at least 0.

    Returns:
        A randomised Hadamard rotation where d is a power of two, else a Haar-distributed matrix.

    Raises:
        ValueError: head_dim below 1 or seed below 0.

    Source: FibQuant (arXiv 2605.11478), section 3, uses a Haar matrix; the Hadamard form is equal
        in quality and costs d log2(d).
    """
    if head_dim < 1:
        raise ValueError(f"make_rotation: head_dim must be at least 1, got {head_dim}; use 64")
    if seed < 0:
        raise ValueError(f"make_rotation: seed must be at least 0, got {seed}; use 0")
    rng = np.random.default_rng(seed)
    if head_dim & (head_dim - 1) == 0:
        signs = torch.from_numpy(1 - 2 * rng.integers(0, 2, head_dim)).float()
        # Row i of the matrix is the transform of unit vector i, transposed (H is symmetric).
        unit_vectors = torch.eye(head_dim, dtype=torch.float32, device="cpu")
        matrix = hadamard_transform(unit_vectors) * signs / math.sqrt(head_dim)
        return Rotation(head_dim, seed, "hadamard", signs, matrix.contiguous())
    matrix = torch.from_numpy(haar_matrix(head_dim, rng)).float().contiguous()
    signs = torch.ones(head_dim, dtype=torch.float32, device="cpu")
    return Rotation(head_dim, seed, "dense", signs, matrix)
