# SPDX-License-Identifier: Apache-2.0
"""The two operations of latent attention on CPUs (csrc/cpu/latent.h).

They do what `write_latents` and `attend_latents` of codec/latent.py do, which are their oracle.
"""

from __future__ import annotations

from ctypes import byref

import torch

from vllm_fibquant.codec import latent as oracle
from vllm_fibquant.codec.latent import LatentCodec
from vllm_fibquant.ops.abi import DTYPES, FqPages
from vllm_fibquant.ops.cpu_library import (
    HEAD_DIM_MULTIPLE,
    MAX_HEAD_DIM,
    FqAttendLatents,
    FqEncodeLatents,
    isa,
    library,
)
from vllm_fibquant.ops.cpu_tables import latent_struct
from vllm_fibquant.ops.selfcheck import (
    MAX_RECORD_MISMATCH,
    NUM_ULP,
    SEQ_LENS,
    SelfCheckResult,
    lay_out,
)


def unsupported_dims(latent_dim: int, rotary_dim: int) -> str | None:
    """Why the kernels cannot take latents and rotary keys of so many coordinates, or None."""
    for name, dim in (("kv_lora_rank", latent_dim), ("qk_rope_head_dim", rotary_dim)):
        if dim % HEAD_DIM_MULTIPLE or not 0 < dim <= MAX_HEAD_DIM:
            return (
                f"{name}: must be a multiple of {HEAD_DIM_MULTIPLE}, at most {MAX_HEAD_DIM}, got "
                f"{dim}; use --kv-cache-dtype auto for this model"
            )
    return None


def write_latents(
    codec: LatentCodec,
    latent: torch.Tensor,
    rotary: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> int:
    """Encodes tokens into their slots.

    Args:
        latent, rotary, slot_mapping: as for the oracle; latents and rotary keys in one dtype,
            float32, bfloat16 or float16, their last axes contiguous.
        cache: as for the oracle, each block's records contiguous.

    Returns:
        How many stored vectors held a NaN or infinity; they are stored as zeros.

    Raises:
        ValueError: a slot outside the cache (the other tokens are stored), or a tensor of another
            shape or layout.
    """
    _check("write_latents", "latent", latent, codec.latent.head_dim)
    _check("write_latents", "rotary", rotary, codec.rotary_dim)
    _check("write_latents", "cache", cache, codec.record_bytes)
    slots = slot_mapping.flatten().long().contiguous()
    if rotary.dtype != latent.dtype or len(slots) > min(len(latent), len(rotary)):
        raise ValueError(
            "write_latents: latent and rotary must have one dtype and a row for every slot, got "
            f"{latent.dtype} and {rotary.dtype}, {len(latent)} and {len(rotary)} rows for "
            f"{len(slots)} slots"
        )
    args = FqEncodeLatents(
        latent=latent.data_ptr(),
        rotary=rotary.data_ptr(),
        slot_mapping=slots.data_ptr(),
        num_tokens=slots.shape[0],
        stride_latent=latent.stride(0),
        stride_rotary=rotary.stride(0),
        rotary_dim=codec.rotary_dim,
        dtype=DTYPES[latent.dtype],
        num_threads=torch.get_num_threads(),
    )
    struct = byref(latent_struct(codec))
    nonfinite: int = library().fq_encode_latents(struct, byref(_pages(cache)), byref(args))
    if nonfinite < 0:
        raise ValueError(
            f"write_latents: slot_mapping must hold slots below {cache.shape[0] * cache.shape[1]} "
            f"or -1, got {int(slots.max())}"
        )
    return nonfinite


def attend_latents(
    codec: LatentCodec,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one new token of each request to its latents, itself included.

    Args:
        query: float32, bfloat16 or float16 `[num_reqs, num_heads, latent_dim + rotary_dim]`, last
            axis contiguous; absorbed: it meets latents as they are.
        cache: as in `write_latents`.
        block_table: integers `[num_reqs, blocks]`.
        seq_lens: integers `[num_reqs]`.

    Returns:
        `[num_reqs, num_heads, latent_dim]`, in the query's dtype. A request of length 0 gives
        zeros; slots behind its end are never read.

    Raises:
        ValueError: a request longer than its row of block_table, a block outside the cache, or a
            tensor of another shape or layout.
    """
    _check("attend_latents", "query", query, codec.latent.head_dim + codec.rotary_dim)
    _check("attend_latents", "cache", cache, codec.record_bytes)
    block_table, seq_lens = (x.int().contiguous() for x in (block_table, seq_lens))
    num_reqs, num_heads, _ = query.shape
    if min(len(block_table), len(seq_lens)) < num_reqs:
        raise ValueError(
            f"attend_latents: block_table and seq_lens must have {num_reqs} rows, as query, got "
            f"{len(block_table)} and {len(seq_lens)}"
        )
    out = query.new_empty(num_reqs, num_heads, codec.latent.head_dim)
    args = FqAttendLatents(
        query=query.data_ptr(),
        out=out.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        stride_query_req=query.stride(0),
        stride_query_head=query.stride(1),
        stride_block_table=block_table.shape[1],
        num_reqs=num_reqs,
        num_heads=num_heads,
        rotary_dim=codec.rotary_dim,
        dtype=DTYPES[query.dtype],
        num_threads=torch.get_num_threads(),
        scale=scale,
    )
    struct = byref(latent_struct(codec))
    error: int = library().fq_attend_latents(struct, byref(_pages(cache)), byref(args))
    if error == 3:
        raise ValueError(
            "attend_latents: seq_lens must not exceed what a row of block_table holds, got "
            f"{int(seq_lens.max())} of {block_table.shape[1] * cache.shape[1]} tokens"
        )
    if error:
        raise ValueError(
            "attend_latents: block_table must hold block numbers inside the cache, below "
            f"{cache.shape[0]}"
        )
    return out


def run_latent_check(
    codec: LatentCodec, dtype: torch.dtype, num_heads: int, block_size: int
) -> SelfCheckResult:
    """As `run_self_check`: encodes and attends a few random latents with the kernels and with the
    oracle.

    Args:
        dtype: the model's dtype.
        num_heads, block_size: as the model will use them.

    Raises:
        RuntimeError: the kernels disagree with the oracle; nothing may be served with them.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks, table, _, slots = lay_out(block_size, generator)
    lengths = torch.tensor(SEQ_LENS, dtype=torch.int32)
    latent_dim, width = codec.latent.head_dim, codec.latent.head_dim + codec.rotary_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    # As views of one tensor, as the model hands them out.
    latent, rotary = draw(len(slots), width).split([latent_dim, codec.rotary_dim], dim=-1)
    query, scale = draw(len(lengths), num_heads, width), width**-0.5
    # 0xFF bytes are NaN norms: reading a slot nobody wrote would show.
    shape = num_blocks, block_size, codec.record_bytes
    written, expected = (torch.full(shape, 0xFF, dtype=torch.uint8) for _ in range(2))
    write_latents(codec, latent, rotary, written, slots)
    oracle.write_latents(codec, latent, rotary, expected, slots)
    mismatch = int((written != expected).any(-1).sum()) / len(slots)
    out = attend_latents(codec, query, written, table, lengths, scale)
    exact, plain = (
        oracle.attend_latents(codec, query.to(precision), written, table, lengths, scale)
        for precision in (torch.float64, torch.float32)
    )
    plain = plain.to(dtype)
    error, largest = (float(x.double().abs().max()) for x in (out - exact, exact))
    tolerance = 2 * float((plain - exact).abs().max()) + NUM_ULP * torch.finfo(dtype).eps * largest
    result = SelfCheckResult(f"cpu-{isa()}", mismatch, error, tolerance)
    if not (mismatch <= MAX_RECORD_MISMATCH and error <= tolerance):
        raise RuntimeError(
            f"run_latent_check: kernel {result.kernel} must equal the oracle (at most "
            f"{MAX_RECORD_MISMATCH:.0%} of records differing, attention error at most "
            f"{tolerance:.1e}), got {mismatch:.1%} and {error:.1e} with latents of {latent_dim}; "
            "refusing to serve: rebuild the library, and report this processor if it persists"
        )
    return result


def _check(function: str, name: str, x: torch.Tensor, width: int) -> None:
    is_row_after_row = name != "cache" or x.stride(1) == width
    if x.shape[-1] != width or x.stride(-1) != 1 or not x.is_cpu or not is_row_after_row:
        raise ValueError(
            f"{function}: {name} must be on the CPU with a contiguous last axis of {width}, got "
            f"{list(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _pages(cache: torch.Tensor) -> FqPages:
    num_blocks, block_size, _ = cache.shape
    return FqPages(cache.data_ptr(), num_blocks, cache.stride(0), 0, 1, block_size)
