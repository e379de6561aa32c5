# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by the Triton kernels: from packed indices to codewords."""

import triton
import triton.language as tl


@triton.jit
def load_indices(
    fields,
    mask,
    NUM_SUBVECS: tl.constexpr,
    SUBVECS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    WORD_BYTES: tl.constexpr,
):
    """Unpacks indices: pointers to index fields `[T]` -> int32 `[T, SUBVECS]`.

    SUBVECS is NUM_SUBVECS rounded up to a power of two; indices beyond it, and of tokens outside
    `mask`, are 0. WORD_BYTES bytes hold any index whatever its first bit: it may read past the
    field by up to two bytes, which the norms that follow keep inside the record.
    """
    subvec = tl.arange(0, SUBVECS)
    bit = subvec * INDEX_BITS
    at = fields[:, None] + (bit >> 3)[None, :]
    wanted = mask[:, None] & (subvec < NUM_SUBVECS)[None, :]
    word = tl.load(at, mask=wanted, other=0).to(tl.int32)
    if WORD_BYTES > 1:
        word |= tl.load(at + 1, mask=wanted, other=0).to(tl.int32) << 8
    if WORD_BYTES > 2:
        word |= tl.load(at + 2, mask=wanted, other=0).to(tl.int32) << 16
    return (word >> (bit & 7)[None, :]) & ((1 << INDEX_BITS) - 1)


@triton.jit
def load_codewords(
    index,
    table,
    T: tl.constexpr,
    SUBVECS: tl.constexpr,
    SUBVEC_DIM: tl.constexpr,
    ROW_BITS: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Codewords side by side: int32 `[T, SUBVECS]` -> float16 `[T, SUBVECS * SUBVEC_DIM]`.

    The table is float16 `[num_rows, SUBVEC_DIM]`; one codeword is one aligned vector load.
    """
    coord = tl.arange(0, SUBVEC_DIM)[None, None, :]
    row = index & ((1 << ROW_BITS) - 1)
    x = tl.load(table + row[:, :, None] * SUBVEC_DIM + coord)
    if FOLDED:
        negative = ((index >> ROW_BITS)[:, :, None] >> coord) & 1
        x = tl.where(negative != 0, -x, x)
    return tl.reshape(x, [T, SUBVECS * SUBVEC_DIM])


@triton.jit
def first_seen(reach, position):
    """The oldest position that queries at `position` see, at least 0: of a window of `reach`, of
    chunks of -reach where that is negative, or 0."""
    first = position * 0
    if reach > 0:
        first = tl.maximum(position - reach + 1, 0)
    if reach < 0:
        first = tl.maximum(position, 0) // -reach * -reach
    return first


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place (Triton has none on every backend)."""
    square = x * x
    # Near zero 1 - exp(-2|x|) cancels; the series' next term is below 5e-9 there.
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def soft_cap_scores(score, soft_cap, SOFT_CAP: tl.constexpr):
    """Scores after the soft cap, if there is one."""
    if SOFT_CAP:
        score = soft_cap * tanh(score / soft_cap)
    return score


@triton.jit
def find_rows(
    query_start_loc,
    seq_lens,
    num_reqs,
    block,
    GROUP_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Which rows a row block owns.

    A row is one query head of one new token. Row blocks hold BLOCK_Q tokens of one request;
    request r's begin at number query_start_loc[r] // BLOCK_Q + r, so that a grid of
    num_tokens // BLOCK_Q + num_reqs row blocks covers every batch without the host knowing it.

    Returns:
        req; query_len; context (tokens cached before the new ones); first (first token of the
        block within its request; at least query_len when the block is empty); token `[BLOCK_M]`
        (row of the query tensor); head `[BLOCK_M]` within the group; position `[BLOCK_M]` in the
        sequence; valid `[BLOCK_M]`.
    """
    low = 0
    high = num_reqs - 1
    while low < high:  # the last request that begins at or before this block
        middle = (low + high + 1) // 2
        begins = tl.load(query_start_loc + middle) // BLOCK_Q + middle
        if begins <= block:
            low = middle
        else:
            high = middle - 1
    req = low
    begin = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - begin
    context = tl.load(seq_lens + req) - query_len
    first = (block - (begin // BLOCK_Q + req)) * BLOCK_Q
    row = tl.arange(0, BLOCK_M)
    within = first + row // GROUP_SIZE
    valid = (row < BLOCK_Q * GROUP_SIZE) & (within >= 0) & (within < query_len)
    return req, query_len, context, first, begin + within, row % GROUP_SIZE, context + within, valid
