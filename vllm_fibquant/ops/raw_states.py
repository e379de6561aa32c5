# SPDX-License-Identifier: Apache-2.0
"""Attention states of a step's raw new tokens, by a library where there are many of them.

A prompt's chunk over its own raw keys and values is ordinary causal attention, which libraries do
on tensor cores: FlashAttention as vLLM brings it, or xformers. Their output and log-sum-exp are a
state as ours are, (o, m, l) = (output, log-sum-exp, 1), which the merge adds to that of the codes
before the chunk, and to a sink.

Our own kernel attends what the libraries are not asked for:

- steps whose requests all have at most MIN_NEW_TOKENS new tokens: for those it reads one tile of
  keys, in one launch where a library's output takes four;
- what is captured into a CUDA graph, since a library's launch follows lengths that the host knows;
- a soft cap, if the library has none, and dtypes and head dims that libraries do not have;
- chunks, if the host does not know where requests' new tokens stand.

Where layers attend within chunks, a request's new tokens are as many sequences as they have chunks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_fibquant.ops.call import Attend, Batch, Fresh

MIN_NEW_TOKENS = 32
"""New tokens of a request up to which our own kernel reads one tile of them."""
LIBRARY_DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RawLibrary:
    """A library's causal attention of several sequences that lie one behind the other.

    Attributes:
        name: for reports.
        has_soft_cap: whether it can cap scores.
        call: (query, key, value, batch, attend) to the output [num_new, num_q_heads, head_dim] in
            query's dtype and the natural log-sum-exp, float32 [num_q_heads, num_new]. Its tensors
            are the rows of the batch's new tokens alone.
    """

    name: str
    has_soft_cap: bool
    call: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def takes(self, query: torch.Tensor, batch: Batch, attend: Attend) -> bool:
        """Whether it is to attend this call's new tokens."""
        starts, head_dim = batch.host_starts, query.shape[2]
        if starts is None or (attend.soft_cap and not self.has_soft_cap):
            return False
        if attend.chunk and _contexts(batch) is None:
            return False
        if query.dtype not in LIBRARY_DTYPES or head_dim % 8 or head_dim > MAX_HEAD_DIM:
            return False
        longest = max((b - a for a, b in zip(starts, starts[1:], strict=False)), default=0)
        if longest <= MIN_NEW_TOKENS:
            return False
        return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def flash_attention(function: Callable[..., Any], version: int) -> RawLibrary:
    """FlashAttention as vLLM brings it.

    Args:
        function: `vllm.vllm_flash_attn.flash_attn_varlen_func`, or one with its signature.
        version: its `fa_version` for the head dim.
    """
    return RawLibrary("flash-attention", True, functools.partial(_flash, function, version))


def _flash(
    function: Callable[..., Any], version: int, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, batch: Batch, attend: Attend,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    starts = _kept(batch, ("starts", attend.chunk), lambda: _from_zero(batch, attend.chunk))
    lens = _kept(batch, ("lens", attend.chunk), lambda: _lens(batch, attend.chunk))
    # A window of n tokens is the n - 1 before a token, and itself.
    window = [attend.window - 1, 0] if attend.window else [-1, -1]
    out, lse = function(
        query, key, value, max_seqlen_q=max(lens), cu_seqlens_q=starts, max_seqlen_k=max(lens),
        cu_seqlens_k=starts, softmax_scale=attend.scale, causal=True, window_size=window,
        softcap=attend.soft_cap, return_softmax_lse=True, fa_version=version,
    )  # fmt: skip
    return out, lse


def xformers() -> RawLibrary | None:
    """xformers (the extra `xformers`), or None where it is not installed or has no kernels."""
    if importlib.util.find_spec("xformers") is None:
        return None
    try:
        from xformers.ops import fmha
    except (ImportError, RuntimeError):  # built for another torch
        return None
    if not fmha.flash.FwOp.is_available():
        return None
    return xformers_by(fmha)


def xformers_by(fmha: Any) -> RawLibrary:
    """xformers, by its module `xformers.ops.fmha`, or one with its functions."""
    return RawLibrary("xformers", False, functools.partial(_xformers, fmha))


def _xformers(
    fmha: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch,
    attend: Attend,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    def mask() -> Any:
        whole = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(
            _lens(batch, attend.chunk), device=query.device
        )
        return whole.make_local_attention(attend.window) if attend.window else whole

    num_new, num_q_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = (1, num_new, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    # Its flash operator by name: others lay out the log-sum-exp in another way.
    out, lse = fmha.memory_efficient_attention_partial(
        query.unflatten(1, group[2:4])[None], key[None, :, :, None].expand(group),
        value[None, :, :, None].expand(group), _kept(batch, ("mask", attend.reach), mask),
        scale=attend.scale, op=fmha.flash.FwOp,
    )  # fmt: skip
    return out.reshape(query.shape), lse.reshape(num_q_heads, num_new)


def of(query: torch.Tensor, batch: Batch, attend: Attend, fresh: Fresh) -> States:
    """States of the batch's rows over their request's raw new tokens.

    Returns:
        float32 o [num_tokens * num_q_heads, head_dim], m and l [num_tokens * num_q_heads]; weights
        are relative to exp(m). Rows of tokens that the batch does not have are not written.
    """
    library = attend.raw_library
    if library is not None and library.takes(query, batch, attend):
        return states_by(library, query, batch, attend, fresh)
    from vllm_fibquant.kernels.attention import raw_token_states

    return raw_token_states(query, batch, attend, fresh)


def states_by(
    library: RawLibrary, query: torch.Tensor, batch: Batch, attend: Attend, fresh: Fresh
) -> States:
    """See `of`; by a library that takes them."""
    if batch.host_starts is None or fresh.raw_key is None or fresh.raw_value is None:
        raise ValueError(
            "states_by: batch must know its query_starts and fresh its raw keys and values, "
            f"got {batch.host_starts} and {'none' if fresh.raw_key is None else 'some'}"
        )
    num_tokens, num_q_heads, head_dim = query.shape
    begin, end = batch.host_starts[0], batch.host_starts[-1]
    rows = (x[begin:end] for x in (query, fresh.raw_key, fresh.raw_value))
    out, lse = library.call(*rows, batch, attend)
    if out.shape != (end - begin, num_q_heads, head_dim) or lse.shape != (num_q_heads, end - begin):
        raise RuntimeError(
            f"states_by: {library.name} must give [{end - begin}, {num_q_heads}, {head_dim}] and "
            f"[{num_q_heads}, {end - begin}], got {list(out.shape)} and {list(lse.shape)}; "
            'give "prefill": "codes", and report the versions'
        )
    o = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    m = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    o[begin:end], m[begin:end] = out, lse.t()
    return o.flatten(0, 1), m.flatten(), torch.ones_like(m).flatten()


def most_floats(num_rows: int, head_dim: int) -> int:
    """float32 elements of a library's states and of what it returns, of so many rows."""
    return num_rows * (head_dim + 2) + num_rows * (head_dim // 2 + 1)


def _contexts(batch: Batch) -> list[int] | None:
    """See `Batch.contexts`; None where reading them would wait for a GPU."""
    if batch.contexts is None and batch.seq_lens.is_cpu and batch.query_start_loc.is_cpu:
        batch.contexts = (batch.seq_lens - batch.query_start_loc.diff()).tolist()
    return batch.contexts


def _bounds(batch: Batch, chunk: int) -> list[int]:
    """The rows where sequences begin, and the last one's end: requests' new tokens, cut where a
    chunk of so many positions begins."""
    starts = batch.host_starts or []
    if not chunk:
        return starts
    begins = [
        row
        for start, end, context in zip(starts, starts[1:], _contexts(batch) or [], strict=False)
        for row in (start, *range(start + chunk - context % chunk, end, chunk))
    ]
    return [*begins, *starts[-1:]]


def _lens(batch: Batch, chunk: int) -> list[int]:
    bounds = _bounds(batch, chunk)
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


def _from_zero(batch: Batch, chunk: int) -> torch.Tensor:
    """`_bounds` from the first of the batch's tokens on, int32 on its device."""
    bounds = _bounds(batch, chunk)
    pinned = batch.device.type == "cuda"  # so that the host need not wait
    made = torch.tensor([x - bounds[0] for x in bounds], dtype=torch.int32, pin_memory=pinned)
    return made.to(batch.device, non_blocking=True)


def _kept(batch: Batch, what: Any, make: Callable[[], Any]) -> Any:
    """What layers of a step have in common, made by the first of them."""
    if not isinstance(batch.kept, dict):
        batch.kept = {}
    if what not in batch.kept:
        batch.kept[what] = make()
    return batch.kept[what]
