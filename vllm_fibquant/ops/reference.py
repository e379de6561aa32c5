# SPDX-License-Identifier: Apache-2.0
"""The oracle: what encoding and attention must do, in plain PyTorch.

Every kernel is tested against these two functions. They are written to be read: one request at
a time, one gather, one softmax. They also serve as the fallback on devices without a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap


@dataclass(frozen=True)
class TokenCopies:
    """Copies of some cached tokens in 16 bits, read in the place of their codes.

    Attributes:
        key: float32, bfloat16 or float16 [num_rows, num_kv_heads, head_dim], contiguous.
        value: as key.
        table: int32 [num_reqs, num_first + num_recent], contiguous: the row that holds a request's
            token at position 0, 1, ... num_first - 1, then at the num_recent positions before its
            first new token; -1 where there is no copy, or no such token.
        num_first: columns of `table` that belong to a request's first tokens.
        new_tokens: int64 [n] or None: the batch's new tokens that are copied once everything has
            been attended, so that a row may change hands within a step.
        new_rows: int64 [n] or None: distinct rows they are copied to.
    """

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor
    num_first: int
    new_tokens: torch.Tensor | None = None
    new_rows: torch.Tensor | None = None

    def store_new(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copies new tokens; vectors that hold a NaN or infinity become zeros, as in codes.

        Args:
            key: float [num_tokens, num_kv_heads, head_dim], the batch's new keys.
            value: as key.
        """
        if self.new_tokens is None or self.new_rows is None:
            return
        for copies, x in ((self.key, key), (self.value, value)):
            new = x[self.new_tokens]
            finite = torch.isfinite(new).all(-1, keepdim=True)
            copies[self.new_rows] = torch.where(finite, new, 0.0).to(copies.dtype)

    def rows(self, req: int, context_len: int) -> torch.Tensor:
        """Rows of the cached tokens 0 to context_len - 1 of one request, -1 for none: int64."""
        num_recent = self.table.shape[1] - self.num_first
        rows = torch.full((context_len,), -1, dtype=torch.int64)
        recent = max(context_len - num_recent, 0)
        rows[recent:] = self.table[req, self.table.shape[1] - (context_len - recent) :].long()
        first = min(self.num_first, context_len)
        rows[:first] = self.table[req, :first].long()
        return rows


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    codec: KVCodec,
    key_map: KeyMap | None = None,
    positions: torch.Tensor | None = None,
) -> int:
    """Encodes new keys and values and stores their records at the mapped slots.

    Args:
        key: float [num_tokens, num_kv_heads, head_dim], after rotary embedding.
        value: float [num_tokens, num_kv_heads, head_dim].
        cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes], written in place.
        slot_mapping: int64 [num_slots], num_slots <= num_tokens; -1 skips a token.
        codec: the codec both vectors are encoded with.
        key_map: how keys are encoded; None for as they are.
        positions: int64 [num_slots], where tokens stand in their requests; read with
            key_map.turning alone.

    Returns:
        How many stored vectors held a NaN or infinity (they are stored as zero vectors).
    """
    num_slots = slot_mapping.shape[0]
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    if slots.numel() == 0:
        return 0
    new_key, new_value = key[:num_slots][keep].float(), value[:num_slots][keep].float()
    block_size = cache.shape[2]
    if key_map is None:
        records = codec.encode_records(new_key, new_value)
    else:
        stands = None if positions is None else positions[keep]
        records = key_map.encode_records(new_key, new_value, codec, stands)
    cache[slots // block_size, :, slots % block_size] = records
    finite = torch.isfinite(torch.stack((new_key, new_value))).all(-1)
    return int((~finite).sum())


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    codec: KVCodec,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    raw_key: torch.Tensor | None = None,
    raw_value: torch.Tensor | None = None,
    copies: TokenCopies | None = None,
    keep_first: int = 0,
    first_query: torch.Tensor | None = None,
    key_map: KeyMap | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Causal attention of each request's newest tokens over its cached codes.

    Args:
        query: float [num_tokens, num_q_heads, head_dim].
        cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes].
        codec: the codec the cache was written with.
        query_start_loc: int32 [num_reqs + 1]; rows of request r are loc[r]:loc[r + 1].
        seq_lens: int32 [num_reqs]; tokens of each request, its new ones included.
        block_table: int32 [num_reqs, max_blocks].
        out: float [num_tokens, num_q_heads, head_dim], written in place.
        scale: factor of the scores.
        window: a query at position p sees positions p - window + 1 to p; 0 means all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 means none.
        sinks: float32 [num_q_heads] or None; one extra logit per head with no value.
        raw_key, raw_value: float [num_tokens, num_kv_heads, head_dim] or None. When given, a
            request's new tokens are attended from these instead of from their codes.
        copies: copies that stand in for codes of cached tokens, and which new tokens are copied
            at the end, or None; they need raw_key.
        keep_first: positions below it are seen whatever the window.
        first_query: as query, or None for query itself; what positions below keep_first are
            scored with.
        key_map: the map that keys at positions from key_map.num_plain on were encoded with.
        compute_dtype: dtype of the arithmetic; float64 gives the tightest judge.
    """
    num_q_heads, num_kv_heads = query.shape[1], cache.shape[1]
    group_size = num_q_heads // num_kv_heads
    block_size = cache.shape[2]
    bounds = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        begin, end = bounds[req], bounds[req + 1]
        query_len = end - begin
        if query_len == 0:
            continue
        positions = torch.arange(seq_len)
        blocks = block_table[req].long()[positions // block_size]
        records = cache[blocks, :, positions % block_size]  # [seq_len, num_kv_heads, record_bytes]
        keys, values = (x.to(compute_dtype) for x in codec.decode_records(records))
        if key_map is not None:
            mapped = slice(key_map.num_plain, None)
            keys[mapped] = key_map.decode_keys(
                records[mapped], codec, compute_dtype, positions[mapped]
            )
            if (means := key_map.first) is not None:
                for x, mean in ((keys, means.key), (values, means.value)):
                    x[: means.num_first] += mean.transpose(0, 1)[:seq_len].to(compute_dtype)
        if raw_key is not None and raw_value is not None:
            keys[seq_len - query_len :] = raw_key[begin:end].to(compute_dtype)
            values[seq_len - query_len :] = raw_value[begin:end].to(compute_dtype)
        if copies is not None:
            rows = copies.rows(req, seq_len - query_len)
            copied = torch.nonzero(rows >= 0).squeeze(-1)
            keys[copied] = copies.key[rows[copied]].to(compute_dtype)
            values[copied] = copies.value[rows[copied]].to(compute_dtype)
        keys = keys.repeat_interleave(group_size, dim=1)
        values = values.repeat_interleave(group_size, dim=1)

        scores = torch.einsum("qhd,shd->hqs", query[begin:end].to(compute_dtype), keys) * scale
        if first_query is not None:
            first = first_query[begin:end].to(compute_dtype)
            scores[..., :keep_first] = (
                torch.einsum("qhd,shd->hqs", first, keys[:keep_first]) * scale
            )
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        query_positions = positions[seq_len - query_len :, None]
        hidden = positions > query_positions
        if window > 0:
            hidden |= (positions <= query_positions - window) & (positions >= keep_first)
        scores.masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            extra = sinks.to(compute_dtype)[:, None, None].expand(-1, query_len, 1)
            scores = torch.cat((scores, extra), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :seq_len]
        out[begin:end] = torch.einsum("hqs,shd->qhd", weights, values).to(out.dtype)
    if copies is not None and raw_key is not None and raw_value is not None:
        copies.store_new(raw_key, raw_value)
