# SPDX-License-Identifier: Apache-2.0
"""The bytes of a record, against examples written out by hand."""

import struct

import pytest
import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, CodeSpec
from vllm_fibquant.codec.layout import RecordLayout, preset_layout

# (preset, head_dim): key index bytes, value index bytes, key norm at, value norm at, record bytes
BY_HAND = {
    ("fibquant_4bit", 64): (32, 32, 64, 66, 68),
    ("fibquant_3bit", 64): (24, 24, 48, 50, 52),
    ("fibquant_2bit", 64): (16, 16, 32, 34, 36),
    ("fibquant_1bit", 64): (8, 8, 16, 18, 20),
    ("fibquant_k4v2", 128): (64, 32, 96, 98, 100),
    ("fibquant_k4v3", 80): (40, 30, 70, 72, 74),
    ("fibquant_2bit", 128): (32, 32, 64, 66, 68),
    ("fibquant_1bit", 112): (14, 14, 28, 30, 32),
}


@pytest.mark.parametrize(("preset", "head_dim"), BY_HAND)
def test_offsets_by_hand(preset, head_dim):
    at = preset_layout(PRESETS[preset], head_dim)
    assert BY_HAND[preset, head_dim] == (
        at.key_index_bytes,
        at.value_index_bytes,
        at.key_norm_offset,
        at.value_norm_offset,
        at.record_bytes,
    )
    assert (at.key_index_offset, at.value_index_offset) == (0, at.key_index_bytes)
    assert at.effective_rate == at.record_bytes * 8 / (2 * head_dim)


def test_odd_index_bytes_are_padded_before_the_norms():
    # 8 indices of 1 bit are 1 byte, 16 of 5 bits are 10: the norms begin at 12, not at 11.
    at = RecordLayout(64, CodeSpec(8, 2).index_bytes(64), CodeSpec(4, 32).index_bytes(64))
    assert (at.key_index_bytes, at.value_index_offset, at.value_index_bytes) == (1, 1, 10)
    assert (at.key_norm_offset, at.value_norm_offset, at.record_bytes) == (12, 14, 16)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_fields_tile_the_record(preset, head_dim):
    at = preset_layout(PRESETS[preset], head_dim)
    indices_end = at.value_index_offset + at.value_index_bytes
    assert at.key_norm_offset - indices_end in (0, 1) and at.key_norm_offset % 2 == 0
    assert at.record_bytes == at.value_norm_offset + 2 == at.key_norm_offset + 4


@pytest.mark.parametrize(("preset", "head_dim"), BY_HAND)
def test_a_record_byte_by_byte(preset, head_dim):
    """Every byte of encoded records, rebuilt from indices and norms as a string of bits."""
    codec = KVCodec.from_preset(preset, head_dim)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(2, 3, head_dim, generator=generator) for _ in range(2))
    records = codec.encode_records(key, value)
    assert records.dtype == torch.uint8 and records.is_contiguous()
    assert records.shape == (2, 3, BY_HAND[preset, head_dim][-1])
    for t in range(2):
        for h in range(3):
            fields, norms = b"", b""
            for side, x in ((codec.key, key), (codec.value, value)):
                indices, norm = side.encode(x[t, h])
                bits = side.spec.index_bits
                number = sum(i << (bits * s) for s, i in enumerate(indices.tolist()))
                fields += number.to_bytes(len(indices) * bits // 8, "little")
                norms += struct.pack("<e", norm.item())
            assert bytes(records[t, h].tolist()) == fields + norms


def test_two_records_written_out():
    """The contract with literal bytes: 12-bit indices 0x123, 0x456, ... and float16 norms."""
    codec = KVCodec.from_preset("fibquant_3bit", 64)
    indices = torch.zeros(16, dtype=torch.int32)
    indices[0], indices[1], indices[15] = 0x123, 0x456, 0xFFF
    record = bytes([0x23, 0x61, 0x45, *[0] * 19, 0xF0, 0xFF])  # key: 24 bytes
    record += bytes([*[0] * 22, 0x10, 0x00])  # value: index 14 is 0x000, index 15 is 0x001
    record += bytes([0x00, 0x3C, 0x00, 0x40])  # norms 1.0 and 2.0
    stored = torch.tensor(list(record), dtype=torch.uint8)
    value_indices = torch.zeros(16, dtype=torch.int32)
    value_indices[15] = 1
    key, value = codec.decode_records_rotated(stored)
    one, two = torch.tensor(1.0).half(), torch.tensor(2.0).half()
    assert torch.equal(key, codec.key.decode_rotated(indices, one))
    assert torch.equal(value, codec.value.decode_rotated(value_indices, two))
    assert not torch.equal(key, value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_byte_of_a_record_matters(preset):
    codec = KVCodec.from_preset(preset, 64)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 64, generator=generator)
    record = codec.encode_records(x[0], x[1])
    for byte in range(len(record)):
        other = record.clone()
        other[byte] ^= 0x55
        before, after = codec.decode_records(record), codec.decode_records(other)
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        at = codec.layout
        is_key = byte < at.value_index_offset or 0 <= byte - at.key_norm_offset < 2
        assert changed == [is_key, not is_key], byte


def test_a_record_of_another_size_is_refused():
    codec = KVCodec.from_preset("fibquant_2bit", 64)
    with pytest.raises(ValueError, match="must be 36 bytes, got 35"):
        codec.decode_records(torch.zeros(2, 35, dtype=torch.uint8))
