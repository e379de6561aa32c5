# SPDX-License-Identifier: Apache-2.0
"""Encode and store: keys and values to the records of their slots.

A program owns BLOCK_V vectors of one side, keys or values: it rotates them with one matrix product,
compares every subvector with every codeword, CHUNK codewords at a time, and writes index bytes and
norms. Bytes of a record belong to exactly one program each; the padding byte belongs to the keys.

The empty case: a slot of -1 writes nothing. A vector that holds a NaN or an infinity, or nothing
above the least normal number, is stored as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_fibquant.codec.config import GAIN_NUMBERS, GainRule
from vllm_fibquant.kernels.tables import DeviceCode, device_codec, next_power_of_two
from vllm_fibquant.ops.call import Pages
from vllm_fibquant.ops.kernels import device_counters

BLOCK_V = 16  # the least number of rows of a matrix product
CHUNK = 32
INPUTS = tl.constexpr(32)


@triton.jit
def _nearest(
    parts, rows_t, half_sq, P: tl.constexpr, NUM_ROWS: tl.constexpr, CHUNK: tl.constexpr,
    SUBVEC_DIM: tl.constexpr,
):  # fmt: skip
    """Nearest rows: float32 `[P, SUBVEC_DIM]` -> int32 `[P]`; ties go to the lowest index."""
    coord = tl.arange(0, SUBVEC_DIM)[None, :]
    best = tl.full([P], float("-inf"), tl.float32)
    best_row = tl.zeros([P], tl.int32)
    for begin in range(0, NUM_ROWS, CHUNK):
        row = begin + tl.arange(0, CHUNK)
        inside = row < NUM_ROWS
        score = -tl.load(half_sq + row, mask=inside, other=float("inf"))[None, :]
        for j in tl.static_range(SUBVEC_DIM):
            y = tl.sum(tl.where(coord == j, parts, 0.0), axis=1)
            c = tl.load(rows_t + j * NUM_ROWS + row, mask=inside, other=0.0)
            score += y[:, None] * c[None, :]
        top = tl.max(score, axis=1)
        winner = tl.min(tl.where(score == top[:, None], row[None, :], NUM_ROWS), axis=1)
        better = top > best
        best_row = tl.where(better, winner, best_row)
        best = tl.where(better, top, best)
    return best_row


@triton.jit
def _stored_norm(y, codeword, length, GAIN: tl.constexpr):
    """The norms that are stored (config.GainRule): float16 of y `[V, DIM]` and its codewords."""
    dot = tl.sum(y * codeword, axis=1)
    sq = tl.maximum(tl.sum(codeword * codeword, axis=1), 1e-12)
    gain = tl.full(length.shape, 1.0, tl.float32)
    if GAIN == 1:
        gain = 1.0 / tl.sqrt(sq)
    elif GAIN == 2:
        gain = tl.maximum(dot, 0.0) / sq
    elif GAIN == 3:
        gain = 1.0 / tl.maximum(dot, 0.25)
    return tl.minimum(length * gain, 65504.0).to(tl.float16)


@triton.jit
def _packed(index, byte, NUM_SUBVECS: tl.constexpr, INDEX_BITS: tl.constexpr):
    """Bytes `[V, BYTES]`: byte b holds bits 8b to 8b + 7 of the field, parts of a few consecutive
    indices `[V, SUBVECS]`."""
    first = (byte * 8) // INDEX_BITS
    packed = tl.zeros([index.shape[0], byte.shape[0]], tl.int32)
    for i in tl.static_range((7 + INDEX_BITS - 1) // INDEX_BITS + 1):
        source = first + i
        inside = source < NUM_SUBVECS
        source = tl.where(inside, source, 0)
        taken = tl.gather(index, tl.broadcast_to(source[None, :], packed.shape), 1)
        shift = source * INDEX_BITS - byte * 8  # where the index's bit 0 falls in this byte
        left = tl.minimum(tl.maximum(shift, 0), 8)[None, :]
        right = tl.minimum(tl.maximum(-shift, 0), INDEX_BITS)[None, :]
        packed |= tl.where(inside[None, :], ((taken << left) >> right) & 0xFF, 0)
    return packed.to(tl.uint8)


@triton.jit
def _encode_side(
    x, cache, slot_mapping, matrix, rows_t, half_sq, counters,
    num_vectors, num_slots_in_cache, stride_token, stride_head, stride_block, stride_cache_head,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, RECORD_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr, INDEX_OFFSET: tl.constexpr, NORM_OFFSET: tl.constexpr,
    INDEX_BYTES: tl.constexpr, PAD_OFFSET: tl.constexpr, SUBVEC_DIM: tl.constexpr,
    INDEX_BITS: tl.constexpr, ROW_BITS: tl.constexpr, FOLDED: tl.constexpr,
    NUM_SUBVECS: tl.constexpr, SUBVECS: tl.constexpr, GAIN: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = SUBVECS * SUBVEC_DIM
    vector = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    token = vector // HEADS
    head = vector % HEADS
    slot = tl.load(slot_mapping + token, mask=vector < num_vectors, other=-1)
    stored = (slot >= 0) & (slot < num_slots_in_cache)
    outside = tl.sum((slot >= num_slots_in_cache).to(tl.int32), axis=0)
    coord = tl.arange(0, DIM)
    in_dim = coord < HEAD_DIM
    at = token.to(tl.int64) * stride_token + head * stride_head
    v = tl.load(
        x + at[:, None] + coord[None, :], mask=stored[:, None] & in_dim[None, :], other=0.0
    ).to(tl.float32)  # [BLOCK_V, DIM]

    # Unit vectors. Dividing by the peak first keeps every square inside float32.
    magnitude = tl.abs(v)
    num_bad = tl.sum((~(magnitude < float("inf"))).to(tl.int32), axis=1)
    peak = tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1)
    usable = (num_bad == 0) & (peak >= 1.1754943508222875e-38)
    divisor = tl.where(usable, peak, 1.0)
    scaled = tl.where(usable[:, None], v / divisor[:, None], 0.0)
    length = tl.where(usable, tl.sqrt(tl.sum(scaled * scaled, axis=1)), 1.0)
    if tl.program_id(1) == 0:
        tl.atomic_add(counters + 1, outside)
    tl.atomic_add(counters, tl.sum((stored & (num_bad > 0)).to(tl.int32), axis=0))

    # y = unit @ matrix^T, INPUTS coordinates of the unit vector at a time: all of a 256 x 256
    # matrix exceed shared memory. Element (i, j) of the operand is matrix[j, i].
    y = tl.zeros([BLOCK_V, DIM], tl.float32)
    for begin in range(0, HEAD_DIM, INPUTS):
        i = begin + tl.arange(0, INPUTS)
        wanted = usable[:, None] & (i < HEAD_DIM)[None, :]
        part = tl.load(x + at[:, None] + i[None, :], mask=wanted, other=0.0).to(tl.float32)
        part = part / divisor[:, None] / length[:, None]
        square = (i < HEAD_DIM)[:, None] & in_dim[None, :]
        transposed = tl.load(
            matrix + coord[None, :] * HEAD_DIM + i[:, None], mask=square, other=0.0
        )
        y += tl.dot(part, transposed, input_precision="ieee")

    # Nearest codeword of every subvector.
    parts = tl.reshape(y, [BLOCK_V * SUBVECS, SUBVEC_DIM])
    searched = parts
    if FOLDED:
        searched = tl.abs(parts)
    row = _nearest(searched, rows_t, half_sq, BLOCK_V * SUBVECS, 1 << ROW_BITS, CHUNK, SUBVEC_DIM)
    index = row
    k = tl.arange(0, SUBVEC_DIM)[None, :]
    codeword = tl.load(rows_t + k * (1 << ROW_BITS) + row[:, None])
    if FOLDED:
        index += tl.sum((parts < 0).to(tl.int32) << k, axis=1) << ROW_BITS
        codeword = tl.where(parts < 0, -codeword, codeword)

    # Padding coordinates of y are 0; those of codewords are masked.
    direction = tl.where(in_dim[None, :], tl.reshape(codeword, [BLOCK_V, DIM]), 0.0)
    norm = _stored_norm(y, direction, tl.where(usable, tl.minimum(peak * length, 1e30), 0.0), GAIN)
    index = tl.where(usable[:, None], tl.reshape(index, [BLOCK_V, SUBVECS]), 0)
    byte = tl.arange(0, BYTES)
    packed = _packed(index, byte, NUM_SUBVECS, INDEX_BITS)

    record = cache + (slot // BLOCK_SIZE) * stride_block + head * stride_cache_head
    record += (slot % BLOCK_SIZE) * RECORD_BYTES
    at_bytes = record[:, None] + INDEX_OFFSET + byte[None, :]
    tl.store(at_bytes, packed, mask=stored[:, None] & (byte < INDEX_BYTES)[None, :])
    at_norm = (record + NORM_OFFSET).to(tl.pointer_type(tl.float16))
    tl.store(at_norm, norm, mask=stored)
    if PAD_OFFSET >= 0:
        tl.store(record + PAD_OFFSET, tl.zeros([BLOCK_V], tl.uint8), mask=stored)


@triton.jit
def _encode(
    key, value, cache, slot_mapping, matrix, key_rows_t, key_half_sq, value_rows_t, value_half_sq,
    counters, num_vectors, num_slots_in_cache, stride_key_token, stride_key_head,
    stride_value_token, stride_value_head, stride_block, stride_cache_head,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, RECORD_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _encode_side(
            key, cache, slot_mapping, matrix, key_rows_t, key_half_sq, counters, num_vectors,
            num_slots_in_cache, stride_key_token, stride_key_head, stride_block, stride_cache_head,
            HEADS, BLOCK_SIZE, RECORD_BYTES, HEAD_DIM, KEY[0], KEY[1], KEY[2], KEY[3], KEY[4],
            KEY[5], KEY[6], KEY[7], KEY[8], KEY[9], KEY[10], BLOCK_V, CHUNK, KEY[11],
        )  # fmt: skip
    else:
        _encode_side(
            value, cache, slot_mapping, matrix, value_rows_t, value_half_sq, counters, num_vectors,
            num_slots_in_cache, stride_value_token, stride_value_head, stride_block,
            stride_cache_head, HEADS, BLOCK_SIZE, RECORD_BYTES, HEAD_DIM, VALUE[0], VALUE[1],
            VALUE[2], VALUE[3], VALUE[4], VALUE[5], VALUE[6], VALUE[7], VALUE[8], VALUE[9],
            VALUE[10], BLOCK_V, CHUNK, VALUE[11],
        )  # fmt: skip


def _side(code: DeviceCode, gain: GainRule, index_offset: int, norm_offset: int, pad: int) -> tuple:
    """A side's compile-time constants, in the order `_encode` unpacks them."""
    c = code.constants
    index_bytes = -(-c["NUM_SUBVECS"] * c["INDEX_BITS"] // 8)
    return (
        index_offset, norm_offset, index_bytes, pad, c["SUBVEC_DIM"], c["INDEX_BITS"],
        c["ROW_BITS"], c["FOLDED"], c["NUM_SUBVECS"], c["SUBVECS"], GAIN_NUMBERS[gain],
        next_power_of_two(index_bytes),
    )  # fmt: skip


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor | None = None,
) -> int:
    """See `ops.encode_kv`; reads nothing back to the host, and returns 0."""
    cache, codec = pages.cache, pages.codec
    num_slots = slot_mapping.shape[0]
    num_blocks, num_heads, block_size, record_bytes = cache.shape
    if num_slots == 0:
        return 0
    tables, at = device_codec(codec, cache.device), codec.layout
    padded = at.key_norm_offset - at.key_index_bytes - at.value_index_bytes
    pad = at.key_norm_offset - 1 if padded else -1
    key_side = _side(tables.key, codec.key.spec.gain, at.key_index_offset, at.key_norm_offset, pad)
    value_side = _side(
        tables.value, codec.value.spec.gain, at.value_index_offset, at.value_norm_offset, -1
    )
    num_vectors = num_slots * num_heads
    _encode[(triton.cdiv(num_vectors, BLOCK_V), 2)](
        key, value, cache, slot_mapping, tables.matrix, tables.key.rows_t, tables.key.half_sq,
        tables.value.rows_t, tables.value.half_sq, device_counters(cache.device), num_vectors,
        num_blocks * block_size, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cache.stride(0), cache.stride(1), HEADS=num_heads, BLOCK_SIZE=block_size,
        RECORD_BYTES=record_bytes, HEAD_DIM=codec.head_dim, BLOCK_V=BLOCK_V, CHUNK=CHUNK,
        KEY=key_side, VALUE=value_side, num_warps=4,
    )  # fmt: skip
    return 0
