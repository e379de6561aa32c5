# SPDX-License-Identifier: Apache-2.0
"""Where every byte of a page is.

A page holds one block of one layer. For each KV head it holds `block_size` token records, one
after another; a record is the code of one key and one value vector:

    offset                       bytes              content
    0                            key_index_bytes    key indices, packed
    key_index_bytes              value_index_bytes  value indices, packed
    norm_offset                  2                  key norm
    norm_offset + 2              2                  value norm

A norm is a little-endian float16. `norm_offset` is the end of the indices, rounded up to an even
number, so that norms are 2-byte aligned.
Index i of a vector occupies bits [i*b, (i+1)*b) of its packed field, b = index_bits, where bit 0
is the least significant bit of the first byte (LSB first). Unused tail bits are 0.

The tensor is `uint8 [num_blocks, num_kv_heads, block_size, record_bytes]`, contiguous in its last
two axes: the bytes of slot s, head h start at
`(s // block_size) * stride_block + h * stride_head + (s % block_size) * record_bytes`.

`csrc/page_layout.h` states the same in C++; tests/codec/test_layout.py compares the two byte by
byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_fibquant.codec.config import Preset

NORM_BYTES = 2
"""Of a norm."""


@dataclass(frozen=True)
class RecordLayout:
    """Byte offsets inside one token record of one KV head."""

    head_dim: int
    key_index_bytes: int
    value_index_bytes: int

    @property
    def key_index_offset(self) -> int:
        return 0

    @property
    def value_index_offset(self) -> int:
        return self.key_index_bytes

    @property
    def key_norm_offset(self) -> int:
        return (self.key_index_bytes + self.value_index_bytes + 1) & ~1

    @property
    def value_norm_offset(self) -> int:
        return self.key_norm_offset + NORM_BYTES

    @property
    def record_bytes(self) -> int:
        return self.value_norm_offset + NORM_BYTES

    @property
    def effective_rate(self) -> float:
        """Stored bits per coordinate, norms and padding included, over K and V together."""
        return 8 * self.record_bytes / (2 * self.head_dim)


def preset_layout(preset: Preset, head_dim: int) -> RecordLayout:
    """The record of one token and KV head.

    Raises:
        ValueError: a subvec_dim does not divide head_dim.
    """
    key, value = preset.key.index_bytes(head_dim), preset.value.index_bytes(head_dim)
    return RecordLayout(head_dim, key, value)
