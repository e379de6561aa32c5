# SPDX-License-Identifier: Apache-2.0
"""What is required of one tensor, and how it is told."""

import pytest
import torch

from vllm_fibquant.ops.checks import at_least, check_tensor

GIVEN = torch.zeros(4, 2, 8)


@pytest.mark.parametrize(
    ("x", "shape", "num_packed"),
    [
        (GIVEN, (4, 2, 8), 3),
        (GIVEN, ("num_tokens", 2, 8), 1),
        (GIVEN, (at_least(4), range(2, 9, 2), range(9)), 1),
        (GIVEN[::2], (2, 2, 8), 2),
        (GIVEN[:, :1], (4, 1, 8), 1),
        (GIVEN[..., :1], (4, 2, 1), 1),  # an axis of one has no stride that counts
        (GIVEN[:0, :, ::2], (0, 2, 4), 3),  # nor has one of what is empty
    ],
)
def test_what_fits_is_handed_back(x: torch.Tensor, shape: tuple, num_packed: int) -> None:
    assert check_tensor("f", "x", x, shape, torch.float32, num_packed=num_packed) is x


@pytest.mark.parametrize(
    ("x", "shape", "num_packed", "message"),
    [
        (None, (4,), 1, r"f: x must be torch.float32 \[4\] on cpu, .* got None"),
        (GIVEN.half(), (4, 2, 8), 1, "got torch.float16"),
        (GIVEN.to("meta"), (4, 2, 8), 1, "on cpu, .* on meta"),
        (GIVEN, (4, 2), 1, r"\[4, 2\].* got .*\[4, 2, 8\]"),
        (GIVEN, (4, 2, 8, 1), 1, r"\[4, 2, 8, 1\]"),
        (GIVEN, (at_least(5), 2, 8), 1, r"\[at least 5, 2, 8\]"),
        (
            GIVEN,
            ("num_tokens", range(3, 13, 3), 8),
            1,
            "num_tokens, at most 12, a multiple of 3, 8",
        ),
        (GIVEN, (range(4), 2, 8), 1, r"\[at most 3, 2, 8\]"),
        (GIVEN[..., ::2], (4, 2, 4), 1, "last axis contiguous"),
        (GIVEN[..., :4], (4, 2, 4), 2, "last 2 axes contiguous"),
        (GIVEN[:, :1], (4, 1, 8), 3, "last 3 axes contiguous"),
    ],
)
def test_what_does_not_fit_is_told(x, shape: tuple, num_packed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tensor(
            "f", "x", x, shape, torch.float32, device=torch.device("cpu"), num_packed=num_packed
        )
