# SPDX-License-Identifier: Apache-2.0
"""Attention states around the split kernel: rotated queries, raw new tokens, and the merge.

A state of a row is (o, m, l): the sum of weights times values, the largest score, and the sum of
weights, all relative to exp(m). The empty state has m = EMPTY and l = 0; its o is not written.
"""

import triton
import triton.language as tl

from vllm_fibquant.kernels.codes import find_rows, first_seen, soft_cap_scores

EMPTY = tl.constexpr(-1e30)
"""The largest score of a state that saw no token: finite, so that no difference is NaN."""
PER_BATCH = ["num_splits", "num_reqs", "num_rows", "num_blocks", "table_width"]
"""What differs from batch to batch: for none of its values a kernel is compiled anew."""
COLUMNS = tl.constexpr(32)
"""Columns of the rotation held at once: all of a 256 x 256 matrix exceed shared memory."""


@triton.jit(do_not_specialize=PER_BATCH)
def rotate_rows(
    query, rotated, matrix, num_rows, stride_token, stride_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rotates queries [num_tokens, HEADS, HEAD_DIM] to contiguous float32. A program owns BLOCK_R
    rows."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    coord = tl.arange(0, DIM)
    in_dim = coord < HEAD_DIM
    mask = (row < num_rows)[:, None] & in_dim[None, :]
    at = (row // HEADS).to(tl.int64) * stride_token + (row % HEADS) * stride_head
    q = tl.load(query + at[:, None] + coord[None, :], mask=mask, other=0.0).to(tl.float32)
    at_out = rotated + row.to(tl.int64)[:, None] * HEAD_DIM
    for begin in range(0, HEAD_DIM, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        square = in_dim[:, None] & (column < HEAD_DIM)[None, :]
        # Element (i, j) of the operand is matrix[j, i].
        transposed = tl.load(
            matrix + column[None, :] * HEAD_DIM + coord[:, None], mask=square, other=0.0
        )
        y = tl.dot(q, transposed, input_precision="ieee")
        wanted = (row < num_rows)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(at_out + column[None, :], y, mask=wanted)


@triton.jit
def softmax_step(score, visible, m, l):  # noqa: E741
    """One online-softmax step.

    Args:
        score: float32 `[M, T]`; visible: its mask; m, l: float32 `[M]`.

    Returns:
        weights `[M, T]`, the factor that rescales o `[M]`, and the new m and l.
    """
    score = tl.where(visible, score, EMPTY)
    new_m = tl.maximum(m, tl.max(score, axis=1))
    weight = tl.where(visible, tl.exp(score - new_m[:, None]), 0.0)
    rescale = tl.exp(m - new_m)
    return weight, rescale, new_m, l * rescale + tl.sum(weight, axis=1)


@triton.jit(do_not_specialize=PER_BATCH)
def attend_raw(
    query, raw_key, raw_value, query_start_loc, seq_lens, state_o, state_ml,
    num_reqs, num_rows, scale, soft_cap, reach, stride_query_token, stride_query_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """States of rows over their request's new tokens, from raw keys and values.

    A program owns one row block of one KV head. state_o is float32 [num_rows, HEAD_DIM] and
    state_ml float32 [2, num_rows], row = token * HEADS + query head.
    """
    kv_head = tl.program_id(1)
    req, query_len, context, first, token, head, position, valid = find_rows(
        query_start_loc, seq_lens, num_reqs, tl.program_id(0), GROUP_SIZE, BLOCK_Q, BLOCK_M
    )
    if first < query_len:
        head += kv_head * GROUP_SIZE
        coord = tl.arange(0, DIM)
        in_dim = coord < HEAD_DIM
        mask = valid[:, None] & in_dim[None, :]
        at_query = token.to(tl.int64) * stride_query_token + head * stride_query_head
        q = tl.load(query + at_query[:, None] + coord[None, :], mask=mask, other=0.0).to(tl.float32)
        o = tl.zeros([BLOCK_M, DIM], tl.float32)
        m = tl.full([BLOCK_M], EMPTY, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        oldest = first_seen(reach, position)
        # As new tokens are counted: from the first of them on.
        begin = tl.maximum(first_seen(reach, context + first) - context, 0) // BLOCK_T * BLOCK_T
        base = tl.load(query_start_loc + req)
        for t0 in range(begin, tl.minimum(first + BLOCK_Q, query_len), BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            loaded = (t < query_len)[:, None] & in_dim[None, :]
            row = (base + t).to(tl.int64)
            at_key = row * stride_key_token + kv_head * stride_key_head
            k = tl.load(raw_key + at_key[:, None] + coord[None, :], mask=loaded, other=0.0)
            at_value = row * stride_value_token + kv_head * stride_value_head
            v = tl.load(raw_value + at_value[:, None] + coord[None, :], mask=loaded, other=0.0)
            score = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
            score = soft_cap_scores(score, soft_cap, SOFT_CAP)
            visible = (context + t)[None, :] <= position[:, None]
            visible &= (context + t)[None, :] >= oldest[:, None]
            weight, rescale, m, l = softmax_step(score, visible, m, l)  # noqa: E741
            o = o * rescale[:, None] + tl.dot(weight, v.to(tl.float32), input_precision="ieee")
        out_row = token.to(tl.int64) * HEADS + head
        tl.store(state_o + out_row[:, None] * HEAD_DIM + coord[None, :], o, mask=mask)
        tl.store(state_ml + out_row, m, mask=valid)
        tl.store(state_ml + num_rows + out_row, l, mask=valid)


@triton.jit(do_not_specialize=PER_BATCH)
def merge_states(
    state_o, state_ml, raw_o, raw_m_of, raw_l_of, matrix, sinks, out, query_start_loc, seq_lens,
    num_splits, num_reqs, num_rows, factor, stride_out_token, stride_out_head,
    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, RAW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merges the states of a row block in order of position, un-rotates, and writes outputs.

    state_o is float32 [num_rows, num_splits, HEAD_DIM], rotated, in units of `factor`; state_ml is
    float32 [2, num_rows, num_splits]. A sink is a logit without a value. A row without any token
    gives zeros.
    """
    kv_head = tl.program_id(1)
    req, query_len, context, first, token, head, position, valid = find_rows(
        query_start_loc, seq_lens, num_reqs, tl.program_id(0), GROUP_SIZE, BLOCK_Q, BLOCK_M
    )
    if first < query_len:
        head += kv_head * GROUP_SIZE
        coord = tl.arange(0, DIM)
        in_dim = coord < HEAD_DIM
        mask = valid[:, None] & in_dim[None, :]
        row = token.to(tl.int64) * HEADS + head
        o = tl.zeros([BLOCK_M, DIM], tl.float32)
        m = tl.full([BLOCK_M], EMPTY, tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        state_l = state_ml + num_rows.to(tl.int64) * num_splits
        for split in range(num_splits):
            at = row * num_splits + split
            split_m = tl.load(state_ml + at, mask=valid, other=EMPTY)
            split_l = tl.load(state_l + at, mask=valid, other=0.0)
            seen = mask & (split_l != 0)[:, None]  # NaN counts as seen
            at_o = state_o + at[:, None] * HEAD_DIM + coord[None, :]
            split_o = tl.load(at_o, mask=seen, other=0.0)
            new_m = tl.maximum(m, split_m)
            here, there = tl.exp(m - new_m), tl.exp(split_m - new_m)
            o = o * here[:, None] + split_o * there[:, None]
            l = l * here + split_l * there  # noqa: E741
            m = new_m
        # The weights of the parts: codes first, then raw tokens, then the sink.
        new_m, raw_weight = m, tl.zeros([BLOCK_M], tl.float32)
        raw_l = tl.zeros([BLOCK_M], tl.float32)
        if RAW:
            raw_m = tl.load(raw_m_of + row, mask=valid, other=EMPTY)
            raw_l = tl.load(raw_l_of + row, mask=valid, other=0.0)
            new_m = tl.maximum(new_m, raw_m)
        if SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0)
            new_m = tl.maximum(new_m, sink)
        weight = tl.exp(m - new_m)
        l = l * weight  # noqa: E741
        if RAW:
            raw_weight = tl.exp(raw_m - new_m)
            l += raw_l * raw_weight  # noqa: E741
        if SINKS:
            l += tl.exp(sink - new_m)  # noqa: E741
        total = tl.where(l == 0, 1.0, l)[:, None]
        at_out = out + (token.to(tl.int64) * stride_out_token + head * stride_out_head)[:, None]
        for begin in range(0, HEAD_DIM, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            square = in_dim[:, None] & (column < HEAD_DIM)[None, :]
            wanted = valid[:, None] & (column < HEAD_DIM)[None, :]
            # y = matrix @ x is undone by its transpose: x = y @ matrix.
            rotation = tl.load(
                matrix + coord[:, None] * HEAD_DIM + column[None, :], mask=square, other=0.0
            )
            x = tl.dot(o, rotation, input_precision="ieee") * (factor * weight[:, None])
            if RAW:
                at_raw = raw_o + row[:, None] * HEAD_DIM + column[None, :]
                x += tl.load(at_raw, mask=wanted, other=0.0) * raw_weight[:, None]
            tl.store(at_out + column[None, :], (x / total).to(out.dtype.element_ty), mask=wanted)
