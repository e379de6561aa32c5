# SPDX-License-Identifier: Apache-2.0
"""Decode attention of others, set up for one case of benchmarks/gpu_proof.py.

Each function returns a call without arguments and the bytes of keys and values it reads. vLLM's
kernels, FlashInfer, flash-attn and xformers are optional: without them ImportError is raised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu_batches import BLOCK_SIZE, OTHERS, Lengths

SPLITS = 32
Prepared = tuple[Callable[[], object], int]


@dataclass(frozen=True)
class Case:
    """One token of each of `batch` requests against `context` cached ones."""

    head_dim: int
    num_kv_heads: int
    group_size: int
    batch: int
    context: int
    device: str

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def num_blocks(self) -> int:
        return self.batch * -(-self.context // BLOCK_SIZE)

    @property
    def lengths(self) -> Lengths:
        """The same for what takes batches of any lengths."""
        return Lengths(
            self.head_dim, self.num_kv_heads, self.group_size, (1,) * self.batch,
            (self.context,) * self.batch, self.device,
        )  # fmt: skip

    def query(self) -> torch.Tensor:
        shape = (self.batch, self.num_q_heads, self.head_dim)
        return torch.randn(shape, device=self.device).bfloat16()

    def lens(self) -> torch.Tensor:
        return torch.full((self.batch,), self.context, dtype=torch.int32, device=self.device)

    def table(self) -> torch.Tensor:
        """A shuffled block table [batch, blocks of a request]."""
        blocks = -(-self.context // BLOCK_SIZE)
        table = torch.randperm(self.batch * blocks).to(torch.int32)
        return table.view(self.batch, blocks).to(self.device)


def make_cache(case: Case | Lengths, codec) -> torch.Tensor:
    """Our pages of a case: random codes, norms from 4 to 12."""
    layout = codec.layout
    cache = torch.randint(
        0, 256,
        (case.num_blocks, case.num_kv_heads, BLOCK_SIZE, layout.record_bytes),
        dtype=torch.uint8, device=case.device,
    )  # fmt: skip
    norms = torch.rand(*cache.shape[:3], 2, device=case.device).half() * 8 + 4
    cache[..., layout.key_norm_offset :] = norms.view(torch.uint8)
    return cache


def random(shape: tuple[int, ...], case: Case) -> torch.Tensor:
    return torch.randn(shape, device=case.device, dtype=torch.bfloat16)


def sdpa(case: Case) -> Prepared:
    """torch's SDPA on contiguous bfloat16: no pages, the easiest case."""
    shape = (case.batch, case.num_kv_heads, case.context, case.head_dim)
    key, value = (random(shape, case) for _ in range(2))
    query, grouped = case.query().unsqueeze(2), case.group_size > 1
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, key, value, enable_gqa=grouped), 4 * key.numel()


def _paged(case: Case, dtype: torch.dtype) -> Prepared:
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    table = case.table()
    shape = (table.numel(), BLOCK_SIZE, case.num_kv_heads, case.head_dim)
    key, value = (random(shape, case).to(dtype) for _ in range(2))
    query = case.query()
    out, lens = torch.empty_like(query), case.lens()
    rows = (case.batch, case.num_q_heads)
    lse, one = torch.empty(rows, device=case.device), torch.ones((), device=case.device)
    logits = torch.empty(*rows, SPLITS, case.head_dim + 1, device=case.device)

    # Without scales of its own it would make two on the device in every call.
    run = functools.partial(
        decode_attention_fwd, query, key, value, out, lse, table, lens, logits, SPLITS,
        case.head_dim**-0.5, BLOCK_SIZE, k_scale=one, v_scale=one,
    )  # fmt: skip
    return run, 2 * key.numel() * key.element_size()


def paged_bf16(case: Case) -> Prepared:
    """vLLM's Triton split-KV decode attention over bfloat16 pages."""
    return _paged(case, torch.bfloat16)


def paged_fp8(case: Case) -> Prepared:
    """The same over float8_e4m3fn pages."""
    return _paged(case, torch.float8_e4m3fn)


def turboquant(case: Case) -> Prepared:
    """vLLM's TurboQuant decode attention, 4 bits for keys and values, over random bytes."""
    from vllm.v1.attention.ops import triton_turboquant_decode as ops

    bits, dim = 4, case.head_dim
    key_bytes = dim * bits // 8 + 2  # indices and a norm
    token_bytes = key_bytes + dim * bits // 8 + 4  # values with scale and zero
    table = case.table()
    shape = (table.numel(), BLOCK_SIZE, case.num_kv_heads, token_bytes)
    cache = torch.randint(0, 60, shape, dtype=torch.uint8, device=case.device)
    query, lens = case.query(), case.lens()
    rotation = torch.eye(dim, device=case.device)
    centroids = torch.linspace(-2, 2, 1 << bits, device=case.device)

    rows = (case.batch, case.num_q_heads)
    run = functools.partial(
        ops.triton_turboquant_decode_attention, query, cache, table, lens, rotation, centroids,
        dim**-0.5, bits, key_bytes, bits, norm_correction=True, PiT=rotation,
        mid_o_buf=torch.empty(*rows, SPLITS, dim + 1, device=case.device),
        output_buf=torch.empty_like(query), lse_buf=torch.empty(rows, device=case.device),
        max_num_kv_splits=SPLITS,
    )  # fmt: skip
    return run, cache.numel()


def flashinfer(case: Case) -> Prepared:
    """FlashInfer's decode attention over bfloat16 pages."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    table = case.table()
    blocks = table.shape[1]
    cache = random((table.numel(), 2, BLOCK_SIZE, case.num_kv_heads, case.head_dim), case)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=case.device), "NHD"
    )
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device) * blocks
    last = (case.lens() - 1) % BLOCK_SIZE + 1
    wrapper.plan(
        starts, table.flatten(), last, case.num_q_heads, case.num_kv_heads, case.head_dim,
        BLOCK_SIZE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    query = case.query()
    return lambda: wrapper.run(query, cache), 2 * cache.numel()


def flash_attn(case: Case) -> Prepared:
    """flash-attn's decode attention over a contiguous bfloat16 cache."""
    from flash_attn import flash_attn_with_kvcache

    shape = (case.batch, case.context, case.num_kv_heads, case.head_dim)
    key, value = (random(shape, case) for _ in range(2))
    query, lens = case.query().unsqueeze(1), case.lens()
    return lambda: flash_attn_with_kvcache(query, key, value, cache_seqlens=lens), 4 * key.numel()


def xformers(case: Case) -> Prepared:
    """xformers' attention over contiguous bfloat16 keys and values, heads grouped."""
    from xformers.ops import fmha

    shape = (1, case.batch * case.context, case.num_kv_heads, 1, case.head_dim)
    key, value = (random(shape, case) for _ in range(2))
    group = (1, -1, case.num_kv_heads, case.group_size, case.head_dim)
    query = case.query().view(group)
    bias = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * case.batch, kv_padding=case.context, kv_seqlen=[case.context] * case.batch
    )

    def run() -> torch.Tensor:
        return fmha.memory_efficient_attention_forward(
            query, key.expand(group), value.expand(group), attn_bias=bias
        )

    return run, 4 * key.numel()


def _any_lengths(prepare: Callable[[Lengths], Prepared], case: Case) -> Prepared:
    return prepare(case.lengths)


PEERS: dict[str, Callable[[Case], Prepared]] = {
    "sdpa": sdpa, "bf16": paged_bf16, "fp8": paged_fp8, "turboquant": turboquant,
    "flashinfer": flashinfer, "flash_attn": flash_attn, "xformers": xformers,
    **{name: functools.partial(_any_lengths, other) for name, other in OTHERS.items()},
}  # fmt: skip
