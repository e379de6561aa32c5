# SPDX-License-Identifier: Apache-2.0
"""The rotation is orthogonal, the same in every process, and its two forms agree."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from vllm_fibquant.codec.config import HEAD_DIMS
from vllm_fibquant.codec.rotation import hadamard_transform, make_rotation


def sylvester(d: int) -> torch.Tensor:
    """H[i, j] = (-1)^popcount(i & j)."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64
    )


@pytest.mark.parametrize("d", [1, 2, 8, 64, 128])
def test_fast_transform_is_the_sylvester_matrix(d):
    x = torch.randint(-8, 8, (3, 5, d)).float()  # small integers: every sum is exact
    assert torch.equal(hadamard_transform(x).double(), x.double() @ sylvester(d).T)


def test_fast_transform_refuses_other_sizes():
    with pytest.raises(ValueError, match="power of two, got 80"):
        hadamard_transform(torch.zeros(80))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("seed", [0, 7])
def test_rotation_is_orthogonal(d, seed):
    rotation = make_rotation(d, seed)
    assert rotation.kind == ("hadamard" if d & (d - 1) == 0 else "dense")
    matrix = rotation.matrix.double()
    assert (matrix @ matrix.T - torch.eye(d)).abs().max() < 1e-6

    x = torch.randn(4, 3, d, generator=torch.Generator().manual_seed(seed))
    y = rotation.apply(x)
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(y.double(), x.double() @ matrix.T, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotation.inverse(y), x, rtol=0, atol=4e-6)
    # Scores survive: <Rx, Ry> = <x, y>.
    torch.testing.assert_close((y @ y.mT), (x @ x.mT), rtol=0, atol=2e-4)


@pytest.mark.parametrize("d", [64, 80])
def test_seeds_differ(d):
    assert len({make_rotation(d, seed).digest for seed in range(4)}) == 4


def test_processes_agree():
    code = (
        "from vllm_fibquant.codec.rotation import make_rotation;"
        "print(make_rotation(64, 3).digest, make_rotation(80, 3).digest)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [make_rotation(d, 3).digest for d in (64, 80)]


def test_hadamard_is_signs_then_transform():
    """The definition kernels implement, from its parts."""
    rotation = make_rotation(64, 5)
    assert set(rotation.signs.tolist()) == {-1.0, 1.0}
    expected = sylvester(64) * rotation.signs.double() / 8
    torch.testing.assert_close(rotation.matrix.double(), expected, rtol=0, atol=1e-7)
    signs = 1 - 2 * np.random.default_rng(5).integers(0, 2, 64)
    assert rotation.signs.tolist() == signs.tolist()


def test_dense_matrix_is_not_biased_by_qr():
    """Plain QR fixes the signs of its diagonal; a Haar matrix has mean 0 in every entry."""
    corner = [make_rotation(80, seed).matrix[0, 0].item() for seed in range(60)]
    assert 15 < sum(c > 0 for c in corner) < 45


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda t: str(t)
)
def test_any_float_dtype_is_accepted(dtype):
    x = torch.randn(2, 80).to(dtype)
    assert torch.equal(make_rotation(80).apply(x), make_rotation(80).apply(x.float()))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="head_dim 64, got shape"):
        make_rotation(64).apply(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        make_rotation(0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        make_rotation(64, -1)
