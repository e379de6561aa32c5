# SPDX-License-Identifier: Apache-2.0
"""The law of a subvector, the initial codebook it asks for, and what quantisers of it can reach.

A subvector of a uniformly random unit vector of R^d has radius R with R^2 ~ Beta(k/2, (d-k)/2) and
a uniform, independent direction. The initial book puts one codeword on each of N shells whose radii
follow the best point density for that law (Bennett-Gersho), in directions that spread evenly
(golden-angle spiral and its relatives).

MSE always means the mean squared error of a whole unit vector: d/k times that of one subvector.

Source: FibQuant (arXiv 2605.11478); the scalar quantiser and the bound are textbook results.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

_GOLDEN = (math.sqrt(5) - 1) / 2


def scipy_special() -> ModuleType:
    """scipy.special, imported only where a codebook is built or judged."""
    try:
        from scipy import special
    except ImportError as error:
        raise RuntimeError(
            "build_codebook: scipy must be installed to build or judge a codebook, got none; "
            "run: pip install scipy"
        ) from error
    return special


def sample_source(
    head_dim: int, subvec_dim: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Subvectors of uniformly random unit vectors.

    Returns:
        float32 `[count, subvec_dim]`.
    """
    x = rng.standard_normal((count, subvec_dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if subvec_dim < head_dim:
        sq = rng.beta(subvec_dim / 2, (head_dim - subvec_dim) / 2, (count, 1))
        x *= np.sqrt(sq)
    return x.astype(np.float32)


def initial_radii(head_dim: int, subvec_dim: int, count: int) -> np.ndarray:
    """Radii of the initial codewords, ascending, float64 `[count]`.

    The best point density is proportional to f^(k/(k+2)) (Bennett-Gersho), here a law of the same
    family: r^2 ~ Beta(k/2, beta), beta = k/(k+2) * (d-k-2)/2 + 1; radii are its mid-quantiles.
    """
    k = subvec_dim
    q = (np.arange(count) + 0.5) / count
    if k == head_dim:
        return np.ones(count)
    if k == 2:
        return np.sqrt(1 - (1 - q) ** (4 / head_dim))
    beta = k / (k + 2) * (head_dim - k - 2) / 2 + 1
    return np.sqrt(scipy_special().betaincinv(k / 2, beta, q))


def initial_directions(subvec_dim: int, count: int) -> np.ndarray:
    """Evenly spread unit vectors, float64 `[count, subvec_dim]`; consecutive ones are far apart.

    k=1: alternating signs. k=2: golden-angle spiral. k=3: Fibonacci sphere, its bands visited in
    golden steps so that radius (ascending) and latitude stay independent. k>=4: Roberts-Kronecker
    sequence, inverse normal in each coordinate, projected to the sphere.
    """
    k = subvec_dim
    n = np.arange(count)
    if k == 1:
        return np.where(n % 2, -1.0, 1.0)[:, None]
    if k == 2:
        angle = 2 * np.pi * ((n * _GOLDEN) % 1)
        return np.stack((np.cos(angle), np.sin(angle)), 1)
    if k == 3:
        steps = range(int(count * _GOLDEN) | 1, 2 * count + 2)
        step = next(s for s in steps if math.gcd(s, count) == 1)
        band = n * step % count
        z = 1 - (2 * band + 1) / count
        angle = 2 * np.pi * ((band * _GOLDEN) % 1)
        ring = np.sqrt(1 - z**2)
        return np.stack((ring * np.cos(angle), ring * np.sin(angle), z), 1)
    ratio = 2.0
    for _ in range(64):  # the root of x^(k+1) = x + 1, a contraction
        ratio = (1 + ratio) ** (1 / (k + 1))
    u = (0.5 + np.outer(n + 1, ratio ** -np.arange(1.0, k + 1))) % 1
    points = scipy_special().ndtri(np.clip(u, 1e-12, 1 - 1e-12))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def initial_codebook(head_dim: int, subvec_dim: int, count: int) -> np.ndarray:
    """The codebook before refinement, float32 `[count, subvec_dim]`."""
    if subvec_dim == 1:
        # On a line there are no directions to choose: mid-quantiles of the signed point density.
        u = 2 * (np.arange(count) + 0.5) / count - 1
        if head_dim == 1:
            return np.sign(u)[:, None].astype(np.float32)
        radii = np.sqrt(scipy_special().betaincinv(0.5, (head_dim - 3) / 6 + 1, np.abs(u)))
        return (np.sign(u) * radii)[:, None].astype(np.float32)
    radii = initial_radii(head_dim, subvec_dim, count)
    return (radii[:, None] * initial_directions(subvec_dim, count)).astype(np.float32)


def scalar_mse(head_dim: int, num_levels: int) -> float:
    """MSE of the best scalar quantiser of one coordinate (Lloyd-Max, as in TurboQuant).

    Exact up to convergence: cells are intervals, so centroids and shares have closed forms under
    the density proportional to (1 - x^2)^((d-3)/2).

    Args:
        head_dim: d, at least 3.
        num_levels: at least 1.
    """
    special = scipy_special()
    half = (head_dim - 1) / 2
    density_at_0 = math.exp(-special.betaln(0.5, half))
    levels = initial_codebook(head_dim, 1, num_levels)[:, 0].astype(np.float64)
    previous = math.inf
    while True:
        edges = np.concatenate(([-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]))
        below = 0.5 + 0.5 * np.sign(edges) * special.betainc(0.5, half, edges**2)
        # The integral of x times the density has the antiderivative -(1-x^2)^half / (2 half).
        primitive = -density_at_0 * (1 - edges**2) ** half / (2 * half)
        share, moment = np.diff(below), np.diff(primitive)
        levels = moment / share
        mse = 1 - head_dim * float(moment @ levels)
        if previous - mse < 1e-12:
            return mse
        previous = mse


def distortion_bound(head_dim: int, rate: float) -> float:
    """Least MSE of a code of `rate` bits per coordinate on a uniform unit vector.

    Of all cells of measure p = 2^(-d rate) a spherical cap has its centroid nearest to the sphere,
    so MSE >= 1 - |centroid of the cap|^2. No codebook of that many whole vectors could be stored:
    this is what is left to gain, not what can be had.

    Args:
        head_dim: d, at least 3.
        rate: bits per coordinate, above 1/d.
    """
    special = scipy_special()
    half = (head_dim - 1) / 2
    log_share = -head_dim * rate * math.log(2)
    log_beta = special.betaln(half, 0.5)

    # A cap of half-angle t, s = sin(t)^2, has measure I_s(half, 1/2) / 2 and first moment
    # s^half / (2 half B(half, 1/2)). Both underflow, so work with logarithms (the incomplete beta
    # function by its hypergeometric series) and find s by bisection.
    def log_moment(log_s: float) -> float:
        return half * log_s - math.log(2 * half) - log_beta

    def log_measure(log_s: float) -> float:
        s = math.exp(log_s)
        series = special.hyp2f1(half + 0.5, 1, half + 1, s)
        return log_moment(log_s) + 0.5 * math.log1p(-s) + math.log(series)

    low, high = -2 * rate * math.log(2) * head_dim / (head_dim - 1) - 10, -1e-9
    for _ in range(200):
        middle = (low + high) / 2
        if log_measure(middle) < log_share:
            low = middle
        else:
            high = middle
    return 1 - math.exp(2 * (log_moment(low) - log_share))
