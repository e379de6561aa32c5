# SPDX-License-Identifier: Apache-2.0
"""Batches of any lengths on a GPU: prompts, chunks of prompts, decodes beside them.

What vLLM serves uncompressed caches with, on the same batches: its FlashAttention (bfloat16, and
fp8 where that is version 3), and its Triton kernel. All are called as vLLM's backends call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK_SIZE = 16
SEGMENTS, LEAST_GRID = 16, 128  # of vLLM's Triton backend: parts of a sequence, CTAs that need none


@dataclass(frozen=True)
class Lengths:
    """Requests, decodes first, as vLLM orders them.

    Attributes:
        query_lens: new tokens of each.
        seq_lens: tokens of each, the new ones included.
    """

    head_dim: int
    num_kv_heads: int
    group_size: int
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    device: str

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    def query(self) -> torch.Tensor:
        shape = (self.num_tokens, self.num_q_heads, self.head_dim)
        return torch.randn(shape, device=self.device).bfloat16()

    def lens(self) -> torch.Tensor:
        return torch.tensor(self.seq_lens, dtype=torch.int32, device=self.device)

    def starts(self) -> torch.Tensor:
        sums = torch.tensor((0, *self.query_lens)).cumsum(0)
        return sums.to(torch.int32).to(self.device)

    @property
    def num_blocks(self) -> int:
        return sum(-(-n // BLOCK_SIZE) for n in self.seq_lens)

    def table(self) -> torch.Tensor:
        """A shuffled block table [requests, most blocks of one]; 0 behind a request's blocks."""
        counts = [-(-n // BLOCK_SIZE) for n in self.seq_lens]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        blocks, first = torch.randperm(self.num_blocks).to(torch.int32), 0
        for row, count in zip(table, counts, strict=True):
            row[:count] = blocks[first : first + count]
            first += count
        return table.to(self.device)


PREFILLS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "prompt of 2k": ((2048,), (2048,)),
    "prompt of 8k": ((8192,), (8192,)),
    "chunk of 2k behind 30k": ((2048,), (32768,)),
    "chunk of 2k beside 31 decodes at 8k": ((1,) * 31 + (2048,), (8192,) * 32),
    "chunk of 2k beside a decode at 128k": ((1, 2048), (131072, 2048)),
}
TINY = {"prompt": ((20,), (20,)), "chunk beside decodes": ((1, 1, 9), (40, 17, 33))}


def ours(case: Lengths, preset: str, kernels=None) -> tuple[Callable[[], object], torch.Tensor]:
    """Attention over codes with `kernels`, those of the GPU when left out; and its outputs.

    As a layer does: decodes have launches of their own.
    """
    from benchmarks.gpu_peers import make_cache
    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.ops import Attend, Batch, Pages, gpu

    codec = KVCodec.from_preset(preset, case.head_dim)
    cache, query = make_cache(case, codec), case.query()
    kernels = kernels or gpu.choose(codec, cache)
    out, loc, lens, table = torch.empty_like(query), case.starts(), case.lens(), case.table()
    num_decodes = sum(n == 1 for n in case.query_lens)
    pages, parts = Pages(cache, codec, None, kernels), []
    for begin, end in ((0, num_decodes), (num_decodes, len(case.query_lens))):
        if begin < end:
            batch = Batch(loc[begin : end + 1], lens[begin:end], table[begin:end])
            rows = sum(case.query_lens[:end])
            attend = Attend(case.head_dim**-0.5)
            parts.append((query[:rows], out[:rows], pages, batch, attend))

    def run() -> None:
        for part in parts:
            kernels.paged_attention(*part)

    return run, out


def _pages(case: Lengths, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int]:
    shape = (case.num_blocks, BLOCK_SIZE, case.num_kv_heads, case.head_dim)
    key, value = (
        torch.randn(shape, device=case.device, dtype=torch.bfloat16).to(dtype) for _ in range(2)
    )
    return key, value, 2 * key.numel() * key.element_size()


def flash(case: Lengths, function: Callable | None = None, fp8: bool = False):
    """vLLM's FlashAttention over its pages; `function` takes its place, for a check of the call."""
    version = 3
    if function is None:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func as function

        version = get_flash_attn_version(head_size=case.head_dim)
    if fp8 and version != 3:
        raise RuntimeError(f"fp8 pages need FlashAttention 3, got version {version}")
    key, value, num_bytes = _pages(case, torch.float8_e4m3fn if fp8 else torch.bfloat16)
    query = case.query()
    options: dict = {}
    if fp8:  # as vLLM does, queries too
        one = torch.ones(1, device=case.device).expand(len(case.seq_lens), case.num_kv_heads)
        options = {f"{name}_descale": one for name in "qkv"}
    run = functools.partial(
        function, q=query.to(key.dtype), k=key, v=value, out=torch.empty_like(query),
        cu_seqlens_q=case.starts(), max_seqlen_q=max(case.query_lens), seqused_k=case.lens(),
        max_seqlen_k=max(case.seq_lens), softmax_scale=case.head_dim**-0.5, causal=True,
        block_table=case.table(), fa_version=version, **options,
    )  # fmt: skip
    return run, num_bytes


def unified(case: Lengths, fp8: bool = False):
    """vLLM's Triton kernel for pages, with the scratch memory its backend gives it."""
    from vllm.v1.attention.ops.triton_unified_attention import KVQuantMode, unified_attention

    key, value, num_bytes = _pages(case, torch.float8_e4m3fn if fp8 else torch.bfloat16)
    query, few = case.query(), LEAST_GRID // case.num_kv_heads
    one = torch.ones(1, device=case.device).expand(len(case.seq_lens), case.num_kv_heads)
    mode = KVQuantMode.FP8_PER_TENSOR if fp8 else KVQuantMode.NONE
    width = 1 << (case.head_dim - 1).bit_length()
    rows = (few, case.num_q_heads, SEGMENTS)
    run = functools.partial(
        unified_attention, q=query, k=key, v=value, out=torch.empty_like(query),
        cu_seqlens_q=case.starts(), max_seqlen_q=max(case.query_lens), seqused_k=case.lens(),
        max_seqlen_k=max(case.seq_lens), softmax_scale=case.head_dim**-0.5, causal=True,
        window_size=(-1, -1), block_table=case.table(), softcap=0.0, q_descale=None,
        k_descale=one, v_descale=one,
        kv_quant_mode=mode,
        seq_threshold_3D=few, num_par_softmax_segments=SEGMENTS,
        softmax_segm_output=torch.empty(*rows, width, device=case.device),
        softmax_segm_max=torch.empty(rows, device=case.device),
        softmax_segm_expsum=torch.empty(rows, device=case.device),
    )  # fmt: skip
    return run, num_bytes


OTHERS: dict[str, Callable] = {
    "vllm_flash": flash,
    "vllm_flash_fp8": functools.partial(flash, fp8=True),
    "unified": unified,
    "unified_fp8": functools.partial(unified, fp8=True),
}
