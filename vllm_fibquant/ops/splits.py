# SPDX-License-Identifier: Apache-2.0
"""How a GPU's attention is cut into splits, and the scratch memory their states need."""

from __future__ import annotations

import functools

import torch


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for what is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(
    num_ctas: int, max_tokens: int, device: torch.device, *, ctas_per_sm: int, min_split: int
) -> int:
    """Splits that fill the device, from shapes alone: the same batch shape, the same splits.

    Args:
        num_ctas: row blocks times KV heads.
        max_tokens: tokens a row of the block table holds.
        device: where the kernel runs.
        ctas_per_sm: how many are wanted on each multiprocessor.
        min_split: tokens below which another split costs more in merging than it saves.
    """
    wanted = -(-ctas_per_sm * num_sms(device) // num_ctas)
    return max(1, min(wanted, max_tokens // min_split))


def workspace_of(given: torch.Tensor | None, floats: int, device: torch.device) -> torch.Tensor:
    """The caller's float32 workspace, or a new one of `floats` elements.

    Raises:
        ValueError: the caller's is too small or of another dtype.
    """
    if given is None:
        return torch.empty(floats, dtype=torch.float32, device=device)
    if given.numel() < floats or given.dtype != torch.float32:
        raise ValueError(
            f"paged_attention: workspace must be float32 of at least {floats} elements, got "
            f"{given.dtype} of {given.numel()}; see workspace_floats"
        )
    return given
