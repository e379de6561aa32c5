# SPDX-License-Identifier: Apache-2.0
"""Paged attention over records: the split kernel and its launcher.

A program owns one row block (new tokens of one request times the query heads of one KV head), and
one split of the positions the block sees. It decodes a tile of BLOCK_T tokens once for all of its
rows and feeds both matrix products with it:

    scores  [rows, T] = queries [rows, d] @ codewords of keys [T, d]^T, times the key norms
    outputs [rows, d] += (weights * value norms) [rows, T] @ codewords of values [T, d]

Everything is in the rotated basis, and in units of the tables; `states.merge_states` undoes both.
The grid depends on shapes alone and lengths are read on the device, so a captured CUDA graph serves
any batch of its size. A split without tokens stores the empty state.

Norms are masked by position before any arithmetic: memory nobody wrote may hold NaN. A block number
outside the cache, or a position beyond the block table, gives NaN, never a read elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vllm_fibquant.kernels.codes import (
    find_rows,
    first_seen,
    load_codewords,
    load_indices,
    soft_cap_scores,
)
from vllm_fibquant.kernels.states import (
    EMPTY,
    PER_BATCH,
    attend_raw,
    merge_states,
    rotate_rows,
    softmax_step,
)
from vllm_fibquant.kernels.tables import device_codec, next_power_of_two, prefixed
from vllm_fibquant.ops import raw_states, splits
from vllm_fibquant.ops.call import Attend, Batch, Fresh, Pages

BLOCK_T = 32
DECODE_ROWS, PREFILL_ROWS = 16, 32
MIN_SPLIT = 256
"""Tokens below which another split costs more in merging than it saves."""
PROGRAMS_PER_SM = 4


def choose_splits(num_programs: int, max_tokens: int, device: torch.device) -> int:
    """See `splits.choose_splits`."""
    slots = PROGRAMS_PER_SM * splits.num_sms(device)
    return splits.choose_splits(num_programs, max_tokens, slots, MIN_SPLIT)


@triton.jit
def _range_of(
    query_len, context, first, reach, split, num_splits,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """The first position that a row block sees, and the positions of its split."""
    begin = first_seen(reach, context + first)
    end = context
    if not RAW:
        end += tl.minimum(first + BLOCK_Q, query_len)
    start = begin // BLOCK_T * BLOCK_T
    num_tiles = tl.cdiv(tl.maximum(end - start, 0), BLOCK_T)
    split_tokens = tl.cdiv(num_tiles, num_splits) * BLOCK_T
    split_begin = start + split * split_tokens
    return begin, split_begin, tl.minimum(split_begin + split_tokens, end)


@triton.jit
def _weighted_sum(weight, norm, v, EXACT: tl.constexpr):
    """The sum of a tile's values v, by weights and norms."""
    if EXACT:
        part = tl.dot(weight * norm[None, :], v.to(tl.float32), input_precision="ieee")
    else:  # a tile's largest norm is factored out, so that half precision holds the rest
        top = tl.max(norm, axis=0)
        top = tl.where(top > 0, top, 1.0)
        part = tl.dot((weight * (norm / top)[None, :]).to(tl.float16), v) * top
    return part


@triton.jit
def _load_queries(rotated, row, coord, mask, HEAD_DIM: tl.constexpr, EXACT: tl.constexpr):
    """Rotated queries of rows, and what their scores are to be multiplied by: half precision holds
    any query once its largest coordinate is 1."""
    q = tl.load(rotated + row[:, None] * HEAD_DIM + coord[None, :], mask=mask, other=0.0)
    factor = tl.full(row.shape, 1.0, tl.float32)
    if not EXACT:
        factor = tl.max(tl.abs(q), axis=1)
        factor = tl.where(factor > 0, factor, 1.0)
        q = (q / factor[:, None]).to(tl.float16)
    return q, factor


@triton.jit
def _find_records(
    head_cache, blocks, t, inside, num_blocks, table_width, stride_block,
    BLOCK_SIZE: tl.constexpr, RECORD_BYTES: tl.constexpr, NORM_OFFSET: tl.constexpr,
):  # fmt: skip
    """Records of the tokens t of one request and KV head, which of them exist, and their norms:
    NaN for the key of a token inside that has no block."""
    entry = t // BLOCK_SIZE
    known = inside & (entry < table_width)
    block = tl.load(blocks + entry, mask=known, other=-1)
    known &= (block >= 0) & (block < num_blocks)
    record = head_cache + block.to(tl.int64) * stride_block + (t % BLOCK_SIZE) * RECORD_BYTES
    norms = (record + NORM_OFFSET).to(tl.pointer_type(tl.float16))
    missing = tl.where(inside & ~known, float("nan"), 0.0)
    key_norm = tl.load(norms, mask=known, other=0.0).to(tl.float32) + missing
    value_norm = tl.load(norms + 1, mask=known, other=0.0).to(tl.float32)
    return record, known, key_norm, value_norm


@triton.jit(do_not_specialize=PER_BATCH)
def _attend_split(
    rotated, cache, block_table, key_table, value_table, query_start_loc, seq_lens, state_o,
    state_ml, num_splits, num_reqs, num_rows, num_blocks, table_width, key_factor, soft_cap, reach,
    stride_block, stride_head, stride_table,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, RECORD_BYTES: tl.constexpr, VALUE_OFFSET: tl.constexpr,
    NORM_OFFSET: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, SOFT_CAP: tl.constexpr, RAW: tl.constexpr,
    EXACT: tl.constexpr, KEY_SUBVEC_DIM: tl.constexpr, KEY_INDEX_BITS: tl.constexpr,
    KEY_ROW_BITS: tl.constexpr, KEY_FOLDED: tl.constexpr, KEY_NUM_SUBVECS: tl.constexpr,
    KEY_SUBVECS: tl.constexpr, KEY_WORD_BYTES: tl.constexpr, VALUE_SUBVEC_DIM: tl.constexpr,
    VALUE_INDEX_BITS: tl.constexpr, VALUE_ROW_BITS: tl.constexpr, VALUE_FOLDED: tl.constexpr,
    VALUE_NUM_SUBVECS: tl.constexpr, VALUE_SUBVECS: tl.constexpr, VALUE_WORD_BYTES: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    req, query_len, context, first, token, head, position, valid = find_rows(
        query_start_loc, seq_lens, num_reqs, tl.program_id(0), GROUP_SIZE, BLOCK_Q, BLOCK_M
    )
    if first < query_len:
        begin, split_begin, split_end = _range_of(
            query_len, context, first, reach, split, num_splits, BLOCK_Q, BLOCK_T, RAW
        )
        head += kv_head * GROUP_SIZE
        row = token.to(tl.int64) * HEADS + head
        coord = tl.arange(0, DIM)
        mask = valid[:, None] & (coord < HEAD_DIM)[None, :]
        q, row_factor = _load_queries(rotated, row, coord, mask, HEAD_DIM, EXACT)
        row_factor *= key_factor
        oldest = first_seen(reach, position)

        o = tl.zeros([BLOCK_M, DIM], tl.float32)
        m = tl.full([BLOCK_M], EMPTY, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        for t0 in range(split_begin, split_end, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            inside = (t >= begin) & (t < split_end)
            record, known, key_norm, value_norm = _find_records(
                cache + kv_head * stride_head, block_table + req * stride_table, t, inside,
                num_blocks, table_width, stride_block, BLOCK_SIZE, RECORD_BYTES, NORM_OFFSET,
            )  # fmt: skip

            # Scores.
            index = load_indices(
                record, known, KEY_NUM_SUBVECS, KEY_SUBVECS, KEY_INDEX_BITS, KEY_WORD_BYTES
            )
            k = load_codewords(
                index, key_table, BLOCK_T, KEY_SUBVECS, KEY_SUBVEC_DIM, KEY_ROW_BITS, KEY_FOLDED
            )
            if EXACT:
                score = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee")
            else:
                score = tl.dot(q, tl.trans(k))
            score = score * row_factor[:, None] * key_norm[None, :]
            score = soft_cap_scores(score, soft_cap, SOFT_CAP)
            visible = inside[None, :] & (t[None, :] <= position[:, None]) & valid[:, None]
            visible &= t[None, :] >= oldest[:, None]
            weight, rescale, m, l = softmax_step(score, visible, m, l)  # noqa: E741

            # Outputs.
            index = load_indices(
                record + VALUE_OFFSET, known, VALUE_NUM_SUBVECS, VALUE_SUBVECS, VALUE_INDEX_BITS,
                VALUE_WORD_BYTES,
            )  # fmt: skip
            v = load_codewords(
                index, value_table, BLOCK_T, VALUE_SUBVECS, VALUE_SUBVEC_DIM, VALUE_ROW_BITS,
                VALUE_FOLDED,
            )  # fmt: skip
            o = o * rescale[:, None] + _weighted_sum(weight, value_norm, v, EXACT)

        at = row * num_splits + split
        if split_begin < split_end:
            tl.store(state_o + at[:, None] * HEAD_DIM + coord[None, :], o, mask=mask)
        tl.store(state_ml + at, m, mask=valid)
        tl.store(state_ml + num_rows.to(tl.int64) * num_splits + at, l, mask=valid)


def workspace_floats(num_rows: int, head_dim: int, num_splits: int) -> int:
    """float32 elements `paged_attention` needs: rotated queries and the states of all splits.

    Args:
        num_rows: tokens of the query tensor times its heads.
        head_dim, num_splits: as given to `paged_attention`.
    """
    return num_rows * (head_dim + num_splits * (head_dim + 2))


def raw_token_states(
    query: torch.Tensor, batch: Batch, attend: Attend, fresh: Fresh
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.raw_states.of`; by our own kernel."""
    raw_key, raw_value = fresh.raw_key, fresh.raw_value
    if raw_key is None or raw_value is None:
        raise ValueError("raw_token_states: raw_key and raw_value must be given, got None")
    query_start_loc, seq_lens = batch.query_start_loc, batch.seq_lens
    scale, soft_cap = attend.scale, attend.soft_cap
    num_tokens, num_q_heads, head_dim = query.shape
    num_kv_heads, num_rows = raw_key.shape[1], num_tokens * num_q_heads
    group_size = num_q_heads // num_kv_heads
    block_m = max(DECODE_ROWS, next_power_of_two(group_size))
    block_q = block_m // group_size
    num_row_blocks = num_tokens // block_q + seq_lens.shape[0]
    o = torch.empty(num_rows, head_dim, dtype=torch.float32, device=query.device)
    ml = torch.empty(2, num_rows, dtype=torch.float32, device=query.device)
    attend_raw[(num_row_blocks, num_kv_heads)](
        query, raw_key, raw_value, query_start_loc, seq_lens, o, ml, seq_lens.shape[0], num_rows,
        scale, soft_cap, attend.reach, query.stride(0), query.stride(1), raw_key.stride(0),
        raw_key.stride(1), raw_value.stride(0), raw_value.stride(1), HEADS=num_q_heads,
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, DIM=next_power_of_two(head_dim), BLOCK_Q=block_q,
        BLOCK_M=block_m, BLOCK_T=BLOCK_T, SOFT_CAP=soft_cap > 0,
    )  # fmt: skip
    return o, ml[0], ml[1]


def paged_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None = None,
    num_splits: int | None = None,
    allocate: Callable[[int, torch.device], torch.Tensor] = splits.allocate,
) -> None:
    """See `ops.paged_attention`; reads nothing back to the host.

    Args:
        num_splits: parts of every sequence; None chooses.
        allocate: (float32 elements, device) to scratch memory, at a multiple of 16 bytes; what is
            allocated while a CUDA graph is captured stays valid in the graph's memory pool.
    """
    cache, codec = pages.cache, pages.codec
    query_start_loc, seq_lens = batch.query_start_loc, batch.seq_lens
    block_table = batch.block_table
    scale, soft_cap = attend.scale, attend.soft_cap
    sinks = attend.sinks
    num_tokens, num_q_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, record_bytes = cache.shape
    num_reqs, table_width = seq_lens.shape[0], block_table.shape[1]
    group_size, num_rows = num_q_heads // num_kv_heads, num_tokens * num_q_heads
    raw = fresh is not None and fresh.raw_key is not None
    tables, at, dim = device_codec(codec, cache.device), codec.layout, next_power_of_two(head_dim)

    block_m = DECODE_ROWS if num_tokens <= 4 * num_reqs else PREFILL_ROWS
    if dim * query.element_size() > 256:  # operands of more such rows exceed shared memory
        block_m = DECODE_ROWS
    block_m = max(block_m, next_power_of_two(group_size))
    block_q = block_m // group_size
    num_row_blocks = num_tokens // block_q + num_reqs
    if num_splits is None:
        num_splits = choose_splits(
            num_row_blocks * num_kv_heads, table_width * block_size, cache.device
        )
    floats = workspace_floats(num_rows, head_dim, num_splits)
    workspace = allocate(floats, cache.device)
    sizes = [
        num_rows * head_dim,
        num_splits * num_rows * head_dim,
        num_splits * num_rows * 2,
    ]
    rotated, state_o, state_ml = workspace[:floats].split(sizes)
    rows = {"HEADS": num_q_heads, "GROUP_SIZE": group_size, "HEAD_DIM": head_dim, "DIM": dim}
    blocks = {"BLOCK_Q": block_q, "BLOCK_M": block_m}

    rotate_rows[(triton.cdiv(num_rows, DECODE_ROWS),)](
        query, rotated, tables.matrix, num_rows, query.stride(0), query.stride(1),
        HEADS=num_q_heads, HEAD_DIM=head_dim, DIM=dim, BLOCK_R=DECODE_ROWS,
    )  # fmt: skip
    _attend_split[(num_row_blocks, num_kv_heads, num_splits)](
        rotated, cache, block_table, tables.key.table, tables.value.table, query_start_loc,
        seq_lens, state_o, state_ml, num_splits, num_reqs, num_rows, num_blocks, table_width,
        scale * tables.key.table_scale, soft_cap, attend.reach, cache.stride(0), cache.stride(1),
        block_table.stride(0), **rows, BLOCK_SIZE=block_size, RECORD_BYTES=record_bytes,
        VALUE_OFFSET=at.value_index_offset, NORM_OFFSET=at.key_norm_offset, **blocks,
        BLOCK_T=BLOCK_T, SOFT_CAP=soft_cap > 0, RAW=raw,
        EXACT=query.dtype == torch.float32, **prefixed("KEY", tables.key.constants),
        **prefixed("VALUE", tables.value.constants), num_warps=4,
    )  # fmt: skip
    # Fewer rows than attend's: this one keeps them in float32, and more would spill.
    block_m = max(DECODE_ROWS, next_power_of_two(group_size))
    blocks = {"BLOCK_Q": block_m // group_size, "BLOCK_M": block_m}
    num_row_blocks = num_tokens // blocks["BLOCK_Q"] + num_reqs
    raw_o, raw_m, raw_l = (state_o, state_ml, state_ml)
    if fresh is not None and raw:
        raw_o, raw_m, raw_l = raw_states.of(query, batch, attend, fresh)
    merge_states[(num_row_blocks, num_kv_heads)](
        state_o, state_ml, raw_o, raw_m, raw_l, tables.matrix,
        sinks if sinks is not None else state_ml, out, query_start_loc, seq_lens, num_splits,
        num_reqs, num_rows, tables.value.table_scale, out.stride(0), out.stride(1), **rows,
        **blocks, RAW=raw, SINKS=sinks is not None,
    )  # fmt: skip
