# SPDX-License-Identifier: Apache-2.0
"""The one door to the kernels: checks every argument, then calls the kernel of the device.

Kernels: the C++ library for CPU tensors (csrc/cpu), Triton for CUDA tensors (`gpu`). The oracle
(`reference`) takes their place only when `use_reference` asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import checks, gpu, native, reference
from vllm_fibquant.ops.reference import TokenCopies

_forced_reference = False

_ERRORS = {
    1: "block_table must hold block numbers inside the cache",
    2: "query_start_loc and seq_lens must describe requests with at least as many tokens as "
    "new tokens",
    3: "seq_lens must not exceed what a row of block_table holds",
    4: "seq_lens must not exceed the positions that key_map.turning knows",
    5: "copies.new_tokens and copies.new_rows must be tokens of the batch and rows of copies.key",
}


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Within this context the oracle stands in for the kernels."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def kernel_name(cache: torch.Tensor | None = None, codec: KVCodec | None = None) -> str:
    """The kernel that serves: ``cpu-avx512``, ``cpu-avx2`` or ``cpu-portable`` on a CPU, ``cuda``
    or ``triton`` on a GPU, or ``reference``.

    Args:
        cache, codec: what is to be served; without them a CPU is meant.

    Raises:
        RuntimeError: the library of the device is not built or does not load.
    """
    if _forced_reference:
        return "reference"
    if cache is not None and codec is not None and cache.is_cuda:
        return gpu.kernel_name(cache, codec)
    return f"cpu-{native.isa()}"


def unsupported_codec(codec: KVCodec, device_type: str = "cpu") -> str | None:
    """Why the kernels of a device cannot take this codec, or None when they can."""
    if device_type == "cuda":
        return gpu.unsupported_codec(codec)
    return unsupported_head_dim(codec.head_dim)


def unsupported_head_dim(head_dim: int) -> str | None:
    """Why the CPU kernels cannot take this head_dim, or None when they can."""
    multiple, most = native.HEAD_DIM_MULTIPLE, native.MAX_HEAD_DIM
    if head_dim % multiple or not 0 < head_dim <= most:
        return f"head_dim must be a multiple of {multiple}, at most {most}, got {head_dim}"
    return None


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
        key: float32, bfloat16 or float16 [num_tokens, num_kv_heads, head_dim], last axis
            contiguous.
        value: as key.
        cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes], last two axes contiguous.
        slot_mapping: int64 [num_slots], num_slots <= num_tokens; -1 skips a token.
        codec: the codec of this cache.
        key_map: how keys are encoded, None for as they are; on the CPU alone.
        positions: int64 [num_slots], where tokens stand in their requests; needed with
            key_map.turning, else unused.

    Returns:
        How many stored vectors held a NaN or infinity; they are stored as zero vectors.

    Raises:
        ValueError: an argument's shape, dtype or layout, a slot outside the cache, or a position
            outside key_map.turning's table.

    Cost: reads 2 * head_dim elements and writes record_bytes per token and KV head; the search
        takes num_rows * head_dim multiply-adds per vector.
    Oracle: reference.encode_kv, equal but for ties of the two nearest codewords.
    """
    if cache.is_cuda and not _forced_reference and key_map is None:
        return gpu.encode_kv(key, value, cache, slot_mapping, codec)
    checks.check_encode(key, value, cache, slot_mapping, codec, key_map, positions)
    _check_cpu("encode_kv", cache, codec)
    kernel = reference.encode_kv if _forced_reference else native.encode_kv
    nonfinite = kernel(key, value, cache, slot_mapping, codec, key_map, positions)
    if nonfinite == -2 and positions is not None:
        raise ValueError(
            "encode_kv: positions must be from 0 to those of key_map.turning, got "
            f"{int(positions.min())} to {int(positions.max())}"
        )
    if nonfinite < 0:
        raise ValueError(
            f"encode_kv: slot_mapping must hold slots below {cache.shape[0] * cache.shape[2]} "
            f"or -1, got {int(slot_mapping.max())}"
        )
    return nonfinite


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
) -> None:
    """Causal attention of each request's newest tokens over its cached codes.

    A row's result depends only on its own query and on the tokens it sees: it is bit-equal
    whatever else is in the batch, however its prompt was cut into chunks, and for any number of
    threads. With raw_key it depends on which tokens are new, but never on other requests.

    Args:
        query: float32, bfloat16 or float16 [num_tokens, num_q_heads, head_dim], last axis
            contiguous.
        cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes], last two axes contiguous.
        codec: the codec of this cache.
        query_start_loc: int32 [num_reqs + 1]; rows of request r are loc[r]:loc[r + 1].
        seq_lens: int32 [num_reqs]; tokens of each request, its new ones included.
        block_table: int32 [num_reqs, max_blocks].
        out: as query; rows query_start_loc[0]:query_start_loc[-1] are written.
        scale: factor of the scores.
        window: a query at position p sees positions p - window + 1 to p; 0 means all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 means none.
        sinks: float32 [num_q_heads] or None; one extra logit per head that has no value.
        raw_key, raw_value: as query with num_kv_heads heads, or None. When given, a request's new
            tokens are attended from these instead of from their codes.
        copies: copies of cached tokens, read instead of their codes, and which new tokens are
            copied at the end; they need raw_key.
        keep_first: a query sees positions below this one whatever the window, in a split of their
            own; not together with raw_key.
        first_query: as query, or None for query itself. What positions below keep_first are scored
            with: the query as it would be nearer to them.
        key_map: the map that keys at positions from key_map.num_plain on were encoded with, or
            None; those below were encoded as they are. On the CPU alone, and without keep_first.

    Raises:
        ValueError: an argument's shape, dtype or layout, or a block number outside the cache.

    Cost: reads record_bytes per cached token and KV head for every 48 rows that share them.
    Oracle: reference.paged_attention.
    """
    if cache.is_cuda and not _forced_reference and key_map is None:
        gpu.paged_attention(
            query, cache, codec, query_start_loc, seq_lens, block_table, out, scale=scale,
            window=window, soft_cap=soft_cap, sinks=sinks, raw_key=raw_key, raw_value=raw_value,
            copies=copies, keep_first=keep_first or None, first_query=first_query,
        )  # fmt: skip
        return
    checks.check_attention(
        query, cache, codec, query_start_loc, seq_lens, block_table, out, window=window,
        soft_cap=soft_cap, sinks=sinks, raw_key=raw_key, raw_value=raw_value, copies=copies,
        keep_first=keep_first, first_query=first_query, key_map=key_map,
    )  # fmt: skip
    _check_cpu("paged_attention", cache, codec)
    if seq_lens.shape[0] == 0 or query.shape[0] == 0:
        return
    kernel = reference.paged_attention if _forced_reference else native.paged_attention
    error = kernel(
        query,
        cache,
        codec,
        query_start_loc,
        seq_lens,
        block_table,
        out,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        raw_key=raw_key,
        raw_value=raw_value,
        copies=copies,
        keep_first=keep_first,
        first_query=first_query,
        key_map=key_map,
    )
    if error:
        raise ValueError(f"paged_attention: {_ERRORS[error]}")


def reserve(query: torch.Tensor, raw: bool) -> None:
    """Takes and frees the memory `paged_attention` would need beside its arguments.

    For an engine that measures its peak with a step in which nothing is attended. On a CPU, whose
    scratch memory is small and kept from call to call, nothing is done.
    """
    if query.is_cuda and not _forced_reference:
        gpu.reserve(query, raw)


def _check_cpu(function: str, cache: torch.Tensor, codec: KVCodec) -> None:
    """What the CPU kernels need beside what every device needs (`checks`)."""
    reason = unsupported_head_dim(codec.head_dim)
    if reason:
        raise ValueError(f"{function}: {reason}")
    if not cache.is_cpu:
        raise ValueError(f"{function}: cache must be on the CPU or a CUDA GPU, got {cache.device}")
