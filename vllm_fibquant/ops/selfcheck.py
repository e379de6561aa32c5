# SPDX-License-Identifier: Apache-2.0
"""Start-up check: the kernel this machine will use, against the oracle, before serving.

A miscompiled library, a damaged codebook in memory or an instruction set that misbehaves shows here
as an error, not as fluent nonsense behind a green health check.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import reference

MAX_RECORD_MISMATCH = 0.02
"""Share of records that may differ between kernel and oracle: ties of the two nearest codewords."""

_SEQ_LENS, _QUERY_LENS = (1, 37, 130), (1, 1, 5)


@dataclass(frozen=True)
class SelfCheckResult:
    """Outcome of one self-check.

    Attributes:
        kernel: name of the kernel checked.
        record_mismatch: share of records that differ from the oracle's.
        error: largest absolute difference of attention outputs in float32.
        tolerance: what `error` had to stay below.
    """

    kernel: str
    record_mismatch: float
    error: float
    tolerance: float


def run_self_check(
    codec: KVCodec,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    block_size: int,
    device: torch.device | None = None,
    key_map: KeyMap | None = None,
) -> SelfCheckResult:
    """Encodes and attends a small random batch with the kernel and with the oracle.

    Args:
        codec: the codec to be served.
        dtype: the model's dtype.
        num_q_heads, num_kv_heads, block_size: as the model will use them.
        device: where the kernel runs; None for the CPU. The oracle runs on the CPU.
        key_map: the map of a layer's keys, or None.

    Returns:
        The result, when it is within bounds.

    Raises:
        RuntimeError: the kernel disagrees with the oracle; nothing may be served with it.
    """
    # Two KV heads are enough to see a wrong stride, and keep this well under a second.
    group_size, num_kv_heads = num_q_heads // num_kv_heads, min(num_kv_heads, 2)
    num_q_heads = group_size * num_kv_heads
    if key_map is not None:
        key_map = key_map.first_heads(num_kv_heads)
    generator = torch.Generator().manual_seed(0)

    def random(num_tokens: int, num_heads: int) -> torch.Tensor:
        shape = (num_tokens, num_heads, codec.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    blocks_of = [-(-n // block_size) for n in _SEQ_LENS]
    num_blocks = sum(blocks_of) + 1
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int64)
    block_table = torch.zeros(len(_SEQ_LENS), max(blocks_of), dtype=torch.int32)
    slots = []
    for req, (seq_len, count) in enumerate(zip(_SEQ_LENS, blocks_of, strict=True)):
        begin = sum(blocks_of[:req])
        block_table[req, :count] = order[begin : begin + count].to(torch.int32)
        positions = torch.arange(seq_len, dtype=torch.int64)
        slots.append(
            block_table[req].long()[positions // block_size] * block_size + positions % block_size
        )
    slot_mapping = torch.cat(slots)
    key, value = random(sum(_SEQ_LENS), num_kv_heads), random(sum(_SEQ_LENS), num_kv_heads)
    shape = (num_blocks, num_kv_heads, block_size, codec.layout.record_bytes)
    # 0xFF bytes are NaN norms: reading a slot nobody wrote would show.
    cache, expected_cache = (torch.full(shape, 0xFF, dtype=torch.uint8) for _ in range(2))
    cache = cache.to(device)

    positions = torch.cat([torch.arange(n) for n in _SEQ_LENS])

    def store(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, key_map: KeyMap | None):
        on_device = key.to(device), value.to(device), cache, slots.to(device)
        ops.encode_kv(*on_device, codec, key_map, positions)
        reference.encode_kv(key, value, expected_cache, slots, codec, key_map, positions)

    store(key, value, slot_mapping, key_map)
    if key_map is not None:
        plain = positions < key_map.num_plain
        first = key_map.without_first(key[plain], value[plain], positions[plain])
        store(*first, slot_mapping[plain], None)
    written = len(slot_mapping) * num_kv_heads
    mismatch = int((cache.cpu() != expected_cache).any(-1).sum()) / written

    query = random(sum(_QUERY_LENS), num_q_heads)
    bounds = torch.tensor([0, *_QUERY_LENS]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(_SEQ_LENS, dtype=torch.int32)
    out, expected = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
    scale = codec.head_dim**-0.5
    out = out.to(device)
    batch = bounds.to(device), seq_lens.to(device), block_table.to(device)
    ops.paged_attention(query.to(device), cache, codec, *batch, out, scale=scale, key_map=key_map)
    args = (cache.cpu(), codec, bounds, seq_lens, block_table)
    reference.paged_attention(query.float(), *args, expected, scale=scale, key_map=key_map)
    error = float((out.cpu().float() - expected).abs().max())
    # Outputs are at most a few units; rounding them to the model's dtype costs up to eps / 2 each.
    tolerance = 8 * torch.finfo(dtype).eps + 1e-5

    result = SelfCheckResult(ops.kernel_name(cache, codec), mismatch, error, tolerance)
    if not (mismatch <= MAX_RECORD_MISMATCH and error <= tolerance):
        raise RuntimeError(
            f"run_self_check: kernel {result.kernel} must equal the oracle (at most "
            f"{MAX_RECORD_MISMATCH:.0%} of records differing, attention error at most "
            f"{tolerance:.1e}), got {mismatch:.1%} and {error:.1e} with head_dim {codec.head_dim}; "
            "refusing to serve: rebuild the library, and report this processor if it persists"
        )
    return result
