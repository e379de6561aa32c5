# SPDX-License-Identifier: Apache-2.0
"""The record of a token in a model with latent attention (MLA), and attention over such records.

A token has one latent vector, key and value at once, and one rotary key, shared by all heads:

    offset                       bytes            content
    0                            index_bytes      indices of the latent, packed as in layout.py
    norm_offset                  2                its norm, float16; the offset is even
    norm_offset + 2              2 * rotary_dim   the rotary key, bfloat16

The latent is coded by a preset's code of values; the rotary key is kept as it is. In plain PyTorch:
the oracle of the kernels (ops/latent.py).
"""

from __future__ import annotations

import functools

import torch

from vllm_fibquant.codec.codec import (
    VectorCodec,
    pack_indices,
    pack_norms,
    unpack_indices,
    unpack_norms,
)
from vllm_fibquant.codec.config import Preset
from vllm_fibquant.codec.layout import NORM_BYTES

ROTARY_ITEM_BYTES = 2


class LatentCodec:
    """The code of a latent, and the record of a token.

    Attributes:
        latent: the code of latents.
        rotary_dim: coordinates of a rotary key.
    """

    def __init__(self, latent: VectorCodec, rotary_dim: int) -> None:
        self.latent = latent
        self.rotary_dim = rotary_dim
        self._index_bytes = latent.spec.index_bytes(latent.head_dim)
        self._norm_offset = (self._index_bytes + 1) & ~1

    @classmethod
    def from_preset(cls, preset: Preset, latent_dim: int, rotary_dim: int) -> LatentCodec:
        """The codec of a preset (cached).

        Raises:
            ValueError: latent_dim not divisible, or a missing or damaged codebook.
        """
        return _latent_codec(preset, latent_dim, rotary_dim)

    @property
    def codes(self) -> tuple[tuple[str, VectorCodec], ...]:
        """Every code, after whose vectors it is."""
        return (("latents'", self.latent),)

    @property
    def record_bytes(self) -> int:
        return self._norm_offset + NORM_BYTES + ROTARY_ITEM_BYTES * self.rotary_dim

    @property
    def effective_rate(self) -> float:
        """Stored bits per coordinate, over latent and rotary key together."""
        return 8 * self.record_bytes / (self.latent.head_dim + self.rotary_dim)

    def encode_records(self, latent: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Records uint8 `[..., record_bytes]` of latents `[..., latent_dim]` and rotary keys
        `[..., rotary_dim]` in any float dtype; a vector with a NaN or an infinity is stored as
        zeros."""
        indices, norms = self.latent.encode(latent)
        packed = pack_indices(indices, self.latent.spec.index_bits)
        gap = packed.new_zeros(*packed.shape[:-1], self._norm_offset - self._index_bytes)
        is_finite = rotary.isfinite().all(-1, keepdim=True)
        kept = torch.where(is_finite, rotary, 0).to(torch.bfloat16).contiguous().view(torch.uint8)
        return torch.cat((packed, gap, pack_norms(norms), kept), -1)

    def decode_records_rotated(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, still rotated, and rotary keys, float32 `[..., latent_dim]` and
        `[..., rotary_dim]`.

        Args:
            records: uint8 `[..., record_bytes]`.
        """
        if records.shape[-1] != self.record_bytes:
            raise ValueError(
                f"decode_records: the last axis of records must be {self.record_bytes} bytes, got "
                f"{records.shape[-1]}; use the codec that wrote them"
            )
        codec, at = self.latent, self._norm_offset
        packed = records[..., : self._index_bytes]
        indices = unpack_indices(packed, codec.num_subvecs, codec.spec.index_bits)
        norms = unpack_norms(records[..., at : at + NORM_BYTES])
        rotary = records[..., at + NORM_BYTES :].contiguous().view(torch.bfloat16)
        return codec.decode_rotated(indices, norms), rotary.float()


@functools.lru_cache(maxsize=16)
def _latent_codec(preset: Preset, latent_dim: int, rotary_dim: int) -> LatentCodec:
    codec = VectorCodec.from_spec(preset.value, latent_dim, preset.rotation_seed)
    return LatentCodec(codec, rotary_dim)


def write_latents(
    codec: LatentCodec,
    latent: torch.Tensor,
    rotary: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Encodes tokens into their slots.

    Args:
        latent: `[num_tokens, latent_dim]`, possibly padded behind slot_mapping's end.
        rotary: `[num_tokens, rotary_dim]`.
        cache: uint8 `[num_blocks, block_size, record_bytes]`, written.
        slot_mapping: int64 `[at most num_tokens]`; -1 is skipped.
    """
    slots = slot_mapping.flatten().long()
    rows = (slots >= 0).nonzero().squeeze(-1)
    slots, block_size = slots[rows], cache.shape[1]
    cache[slots // block_size, slots % block_size] = codec.encode_records(
        latent[rows], rotary[rows]
    )


def attend_latents(
    codec: LatentCodec,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token of each request to its latents, itself included.

    The query is rotated in the place of every latent, and the sum is rotated back once. Scores and
    sums are float32, or float64 for a query in float64. A request of length 0 gives zeros; slots
    behind its end are never read.

    Args:
        query: `[num_reqs, num_heads, latent_dim + rotary_dim]`, absorbed: it meets latents as they
            are.
        cache: uint8 `[num_blocks, block_size, record_bytes]`.
        block_table: integers `[num_reqs, blocks]`.
        seq_lens: integers `[num_reqs]`.

    Returns:
        `[num_reqs, num_heads, latent_dim]`, in the query's dtype.
    """
    latent_dim, block_size = codec.latent.head_dim, cache.shape[1]
    rotation = codec.latent.rotation
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    of_latent = rotation.apply(query[..., :latent_dim]).to(compute_dtype)
    of_rotary = query[..., latent_dim:].to(compute_dtype)
    summed = torch.zeros_like(of_latent)
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        blocks = block_table[row, : -(-length // block_size)].long()
        records = cache[blocks].flatten(0, 1)[:length]  # [length, record_bytes]
        latent, rotary = (x.to(compute_dtype) for x in codec.decode_records_rotated(records))
        scores = of_latent[row] @ latent.T + of_rotary[row] @ rotary.T  # [num_heads, length]
        summed[row] = (scale * scores).softmax(-1) @ latent
    return rotation.inverse(summed).to(query.dtype)
