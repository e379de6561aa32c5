# SPDX-License-Identifier: Apache-2.0
"""What a layer's keys are made into before they are encoded, so that the code fits them better.

Keys of one head have much in common: most of a key's length is often a mean that all keys share. A
code spends its bits on the direction of a vector, so what is common is subtracted first, and the
bits describe what tells keys apart. Scores lose nothing: <q, k> = <q, k - m> + <q, m>, and the last
term is one number per query.

A request's first tokens are not like its others (attention sinks): they are encoded as they are.

Source: ours; for first tokens StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class KeyMap:
    """The map of one layer's keys, k -> k - mean of its head.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], contiguous, finite.
        num_plain: first tokens of a request whose keys are encoded as they are, at least 0.

    Raises:
        ValueError: another shape, dtype or value.
    """

    mean: torch.Tensor
    num_plain: int

    def __post_init__(self) -> None:
        mean = self.mean
        if mean.dtype != torch.float32 or mean.dim() != 2 or not mean.is_contiguous():
            raise ValueError(
                "KeyMap: mean must be contiguous float32 [num_kv_heads, head_dim], got "
                f"{mean.dtype} {list(mean.shape)}"
            )
        if not torch.isfinite(mean).all():
            raise ValueError("KeyMap: mean must be finite, got NaN or infinity; calibrate again")
        if self.num_plain < 0:
            raise ValueError(f"KeyMap: num_plain must be at least 0, got {self.num_plain}")

    def apply(self, key: torch.Tensor) -> torch.Tensor:
        """Keys float32 [..., num_kv_heads, head_dim] as they are to be encoded."""
        return key - self.mean

    def inverse(self, key: torch.Tensor) -> torch.Tensor:
        """Keys as they were, from what `apply` made of them: any float dtype, as `apply`."""
        return key + self.mean.to(key.dtype)

    def first_heads(self, num_kv_heads: int) -> KeyMap:
        """The map of the first `num_kv_heads` heads."""
        return KeyMap(self.mean[:num_kv_heads].contiguous(), self.num_plain)
