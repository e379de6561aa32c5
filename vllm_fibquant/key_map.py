# SPDX-License-Identifier: Apache-2.0
"""What a layer's keys are made into before they are encoded, so that the code fits them better.

Keys of one head have much in common: most of a key's length is often a mean that all keys share. A
code spends its bits on the direction of a vector, so what is common is subtracted first, and the
bits describe what tells keys apart. Scores lose nothing: <q, k> = <q, k - m> + <q, m>, and the last
term is one number per query. What is left may also be transformed (`key_transform`).

A request's first tokens are not like its others (attention sinks): they are encoded as they are.

Source: ours; for first tokens StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fibquant.codec import KVCodec
from vllm_fibquant.key_transform import KeyTransform
from vllm_fibquant.layout import NORM_BYTES


@dataclass(frozen=True, eq=False)
class KeyMap:
    """How one layer's keys are encoded: k - mean of its head, as it is or transformed.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], contiguous, finite.
        num_plain: first tokens of a request whose keys are encoded as they are, at least 0.
        transform: of k - mean, or None; its codes take the place of the codec's.

    Raises:
        ValueError: another shape, dtype or value.
    """

    mean: torch.Tensor
    num_plain: int
    transform: KeyTransform | None = None

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

    def encode_records(
        self, key: torch.Tensor, value: torch.Tensor, codec: KVCodec
    ) -> torch.Tensor:
        """As `KVCodec.encode_records`, for keys float32 [..., num_kv_heads, head_dim]."""
        key = key - self.mean
        records = codec.encode_records(key, value)
        if self.transform is not None:
            at = codec.layout
            indices, norms = self.transform.encode(key)
            records[..., at.key_index_offset : at.key_index_offset + indices.shape[-1]] = indices
            records[..., at.key_norm_offset : at.key_norm_offset + NORM_BYTES] = norms.unsqueeze(
                -1
            ).view(torch.uint8)
        return records

    def decode_keys(
        self, records: torch.Tensor, codec: KVCodec, dtype: torch.dtype
    ) -> torch.Tensor:
        """Keys of records uint8 [..., num_kv_heads, record_bytes], in the model's basis.

        Returns:
            dtype [..., num_kv_heads, head_dim].
        """
        if self.transform is None:
            return codec.decode_records(records)[0].to(dtype) + self.mean.to(dtype)
        at = codec.layout
        index_end = at.key_index_offset + self.transform.index_bytes
        indices = records[..., at.key_index_offset : index_end]
        norms = records[..., at.key_norm_offset : at.key_norm_offset + NORM_BYTES].contiguous()
        norms = norms.view(torch.float16).squeeze(-1)
        return self.transform.decode(indices, norms, dtype) + self.mean.to(dtype)

    def first_heads(self, num_kv_heads: int) -> KeyMap:
        """The map of the first `num_kv_heads` heads."""
        transform = self.transform and self.transform.first_heads(num_kv_heads)
        return KeyMap(self.mean[:num_kv_heads].contiguous(), self.num_plain, transform)
