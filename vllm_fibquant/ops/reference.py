# SPDX-License-Identifier: Apache-2.0
"""The oracle: what encoding and attention must do, in plain PyTorch.

Every kernel is tested against these two functions. They are written to be read: one request at
a time, one gather, one softmax.
"""

from __future__ import annotations

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops.call import Attend, Batch, Copied, Fresh, Pages
from vllm_fibquant.ops.kernels import Kernels


def encode_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: Pages,
    positions: torch.Tensor | None = None,
    copied: Copied | None = None,
) -> int:
    """Encodes new keys and values and stores their records at the mapped slots.

    Args:
        key: float [num_tokens, num_kv_heads, head_dim], after rotary embedding.
        value: float [num_tokens, num_kv_heads, head_dim].
        slot_mapping: int64 [num_slots], num_slots <= num_tokens; -1 skips a token.
        pages: where the records go, and how they are encoded.
        positions: int64 [at least num_slots], where tokens stand in their requests; read with
            a key_map alone.
        copied: see `call`; vectors that hold a NaN or infinity are copied as zeros.

    Returns:
        How many stored vectors held a NaN or infinity (they are stored as zero vectors).
    """
    cache, codec, key_map = pages.cache, pages.codec, pages.key_map
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
        stands = None if positions is None else positions[:num_slots][keep]
        records = key_map.encode_records(new_key, new_value, codec, stands)
    cache[slots // block_size, :, slots % block_size] = records
    if copied is not None:
        rows = copied.rows[:num_slots][keep].long()
        _copy(copied.copies.key, rows[rows >= 0], new_key[rows >= 0])
        _copy(copied.copies.value, rows[rows >= 0], new_value[rows >= 0])
    finite = torch.isfinite(torch.stack((new_key, new_value))).all(-1)
    return int((~finite).sum())


def _copy(copies: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
    """Copies vectors to rows; those that hold a NaN or infinity become zeros."""
    finite = torch.isfinite(new).all(-1, keepdim=True)
    copies[rows] = torch.where(finite, new, 0.0).to(copies.dtype)


def paged_attention(
    query: torch.Tensor,
    out: torch.Tensor,
    pages: Pages,
    batch: Batch,
    attend: Attend,
    fresh: Fresh | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Causal attention of each request's newest tokens over its cached codes.

    Args:
        query: float [num_tokens, num_q_heads, head_dim].
        out: float [num_tokens, num_q_heads, head_dim], written in place.
        pages, batch, attend, fresh: see `call`.
        compute_dtype: dtype of the arithmetic; float64 gives the tightest judge.
    """
    cache, codec, key_map = pages.cache, pages.codec, pages.key_map
    raw_key, raw_value, first_query = fresh or Fresh()
    scale, window, keep_first = attend.scale, attend.window, attend.keep_first
    num_q_heads, num_kv_heads = query.shape[1], cache.shape[1]
    group_size = num_q_heads // num_kv_heads
    block_size = cache.shape[2]
    bounds = batch.query_start_loc.tolist()
    for req, seq_len in enumerate(batch.seq_lens.tolist()):
        begin, end = bounds[req], bounds[req + 1]
        query_len = end - begin
        if query_len == 0:
            continue
        positions = torch.arange(seq_len)
        blocks = batch.block_table[req].long()[positions // block_size]
        records = cache[blocks, :, positions % block_size]  # [seq_len, num_kv_heads, record_bytes]
        if key_map is None:
            keys, values = (x.to(compute_dtype) for x in codec.decode_records(records))
        else:
            keys, values = key_map.decode_records(records, codec, compute_dtype, positions)
        if raw_key is not None and raw_value is not None:
            keys[seq_len - query_len :] = raw_key[begin:end].to(compute_dtype)
            values[seq_len - query_len :] = raw_value[begin:end].to(compute_dtype)
        if batch.copy_table is not None and attend.copies is not None:
            rows = copied_rows(batch.copy_table[req], attend.copies.num_first, seq_len - query_len)
            copied = torch.nonzero(rows >= 0).squeeze(-1)
            keys[copied] = attend.copies.key[rows[copied]].to(compute_dtype)
            values[copied] = attend.copies.value[rows[copied]].to(compute_dtype)
        keys = keys.repeat_interleave(group_size, dim=1)
        values = values.repeat_interleave(group_size, dim=1)

        scores = torch.einsum("qhd,shd->hqs", query[begin:end].to(compute_dtype), keys) * scale
        if first_query is not None:
            first = first_query[begin:end].to(compute_dtype)
            scores[..., :keep_first] = (
                torch.einsum("qhd,shd->hqs", first, keys[:keep_first]) * scale
            )
        if attend.soft_cap > 0:
            scores = attend.soft_cap * torch.tanh(scores / attend.soft_cap)
        query_positions = positions[seq_len - query_len :, None]
        hidden = positions > query_positions
        if window > 0:
            hidden |= (positions <= query_positions - window) & (positions >= keep_first)
        if attend.chunk > 0:
            hidden |= positions // attend.chunk < query_positions // attend.chunk
        scores.masked_fill_(hidden, float("-inf"))
        if attend.sinks is not None:
            extra = attend.sinks.to(compute_dtype)[:, None, None].expand(-1, query_len, 1)
            scores = torch.cat((scores, extra), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :seq_len]
        out[begin:end] = torch.einsum("hqs,shd->qhd", weights, values).to(out.dtype)
    if attend.copies is not None and batch.new_rows is not None:
        for copies, raw in ((attend.copies.key, raw_key), (attend.copies.value, raw_value)):
            if raw is not None:
                _copy(copies, batch.new_rows, raw[batch.new_tokens])


def copied_rows(table_row: torch.Tensor, num_first: int, context_len: int) -> torch.Tensor:
    """Rows of the copies of one request's cached tokens 0 to context_len - 1, -1 for none: int64.

    Args:
        table_row: int32 [num_first + num_recent], a request's row of `Batch.copy_table`.
    """
    num_columns = table_row.shape[0]
    rows = torch.full((context_len,), -1, dtype=torch.int64)
    recent = max(context_len - (num_columns - num_first), 0)
    rows[recent:] = table_row[num_columns - (context_len - recent) :].long()
    first = min(num_first, context_len)
    rows[:first] = table_row[:first].long()
    return rows


class Reference(Kernels):
    """The oracle in the place of kernels, for CPU tensors."""

    implementation = "reference"
    copies_while = ("encoding", "attending")

    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        if cache is not None and not cache.is_cpu:
            return f"cache must be on the CPU for the reference, got {cache.device}"
        return None

    encode_kv = staticmethod(encode_kv)
    paged_attention = staticmethod(paged_attention)
