# SPDX-License-Identifier: Apache-2.0
"""How a GPU's attention is cut into splits, and the scratch memory their states need."""

from __future__ import annotations

import functools
import math

import torch

START_TOKENS = 256
"""What a CTA does before its first and after its last token takes as long as so many tokens."""
ENOUGH = 1.03
"""Times the shortest time: fewer splits within it are taken, for a cheaper merge."""


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for what is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def choose_splits(num_ctas: int, max_tokens: int, slots: int, min_split: int) -> int:
    """Splits that fill the device, from shapes alone: the same batch shape, the same splits.

    CTAs run in waves of `slots`, and the last wave is rarely full. The time of n splits is that of
    all their waves, each as long as a split and its start.

    Args:
        num_ctas: row blocks that have rows, times KV heads.
        max_tokens: tokens a row of the block table holds.
        slots: CTAs that run at once.
        min_split: least tokens of a split.
    """
    times = [
        math.ceil(num_ctas * n / slots) * (max_tokens / n + START_TOKENS)
        for n in range(1, max(1, max_tokens // min_split) + 1)
    ]
    enough = ENOUGH * min(times)
    return next(n for n, time in enumerate(times, 1) if time <= enough)


def num_row_blocks(num_reqs: int, num_tokens: int, group_size: int, columns: int) -> int:
    """Row blocks that have rows: exactly where all requests have as many new tokens, else at
    least so many.

    Args:
        num_reqs, num_tokens: of the batch, padding included.
        group_size: query heads per KV head.
        columns: rows of a row block.
    """
    if num_tokens % num_reqs == 0:
        return num_reqs * math.ceil(num_tokens // num_reqs * group_size / columns)
    return max(num_reqs, math.ceil(num_tokens * group_size / columns))


def allocate(floats: int, device: torch.device) -> torch.Tensor:
    """Scratch memory of `floats` float32 elements."""
    return torch.empty(floats, dtype=torch.float32, device=device)
