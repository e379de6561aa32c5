# SPDX-License-Identifier: Apache-2.0
"""Stored norms: two bytes of float16, or one byte, the number of a level on a logarithmic grid.

Level 0 is 0, level i is LOWEST * 2**((i - 1) / LEVELS_PER_OCTAVE), rounded to float16. A norm is
stored as its nearest level, so the largest error is 2.2 % of it and its mean square 1.6e-4: that
much of a vector's energy is added to the code's error. Norms below half the lowest level become 0,
those above the highest level become that.
"""

from __future__ import annotations

import functools

import torch

NUM_LEVELS = 256
LEVELS_PER_OCTAVE = 16
LOWEST = 2.0**-5
"""0.03 to 1878 = LOWEST * 2**(254 / 16): norms of keys and values are from 0.16 to 38 in
SmolLM2-135M, and keys with large biases have some hundreds."""

_NUM_HALVES = 1 << 15  # bit patterns of float16 without a sign


@functools.cache
def levels() -> torch.Tensor:
    """The norm of every level: float32 `[256]`, ascending, each of them a float16."""
    numbers = torch.arange(NUM_LEVELS - 1, dtype=torch.float64, device="cpu")
    norms = LOWEST * 2.0 ** (numbers / LEVELS_PER_OCTAVE)
    norms = torch.cat((torch.zeros(1, dtype=torch.float64, device="cpu"), norms))
    return norms.to(torch.float16).float()


@functools.cache
def level_of_half() -> torch.Tensor:
    """The level of every norm: uint8 `[32768]`, by the bits of its float16."""
    numbers = torch.arange(_NUM_HALVES, dtype=torch.int32, device="cpu")
    halves = numbers.to(torch.int16).view(torch.float16)
    between = (levels()[1:] + levels()[:-1]) / 2
    return torch.bucketize(halves.float().nan_to_num(torch.inf), between).to(torch.uint8)


def pack_norms(norms: torch.Tensor, norm_bytes: int) -> torch.Tensor:
    """Norms float16 `[...]`, at least 0, to bytes: uint8 `[..., norm_bytes]`."""
    if norm_bytes == 1:
        halves = norms.contiguous().view(torch.int16).long() & (_NUM_HALVES - 1)
        return level_of_half().to(norms.device)[halves].unsqueeze(-1)
    return norms.unsqueeze(-1).contiguous().view(torch.uint8)


def unpack_norms(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_norms`: uint8 `[..., 1 or 2]` to float16 `[...]`."""
    if stored.shape[-1] == 1:
        return levels().to(stored.device)[stored.squeeze(-1).long()].to(torch.float16)
    # A copy: where they lie in their record they may not be aligned.
    aligned = stored.clone(memory_format=torch.contiguous_format)
    return aligned.view(torch.float16).squeeze(-1)
