# SPDX-License-Identifier: Apache-2.0
"""Raw new tokens attended by a library, merged with codes in the emulated CUDA kernels, against the
oracle.

The libraries run on GPUs alone. In their place stand functions in PyTorch with their signatures,
masks and layouts, read in vLLM's `vllm_flash_attn/flash_attn_interface.py` and in xformers'
`ops/fmha`: what is tested is what we ask them and what we make of their answers.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import emulated as emu
from tests.ops.test_cuda_emulated import check, codec_of, gpu_door, paged_of  # noqa: F401
from vllm_fibquant.ops import Attend, Batch, Fresh, Pages, cuda, raw_states, selfcheck
from vllm_fibquant.ops.raw_states import RawLibrary

LENS, NEW = [70, 40, 33, 90, 9], [40, 40, 1, 33, 9]
"""A chunk behind codes, a prompt's first chunk, a decode, another chunk and a short prompt."""


def masked(query, key, value, visible, scale, soft_cap=0.0):
    """Attention of [n, heads, d] in float32: output in query's dtype and lse [heads, n]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    scores = scores.masked_fill(~visible, -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), value)
    return out.to(query.dtype), scores.logsumexp(-1)


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=None, softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    return_softmax_lse=False, out=None, scheduler_metadata=None, q_descale=None, k_descale=None,
    v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None, **others,
):  # fmt: skip
    """As vLLM's: masks aligned to the end, a window [left, right] that does not count the token
    itself, -1 for none, and a log-sum-exp [heads, tokens]."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[0] == 0 and return_softmax_lse
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    left, right = window_size
    assert causal and (left < 0 or right == 0)
    row = torch.arange(len(q))
    req = torch.searchsorted(cu_seqlens_q, row.int(), right=True)
    behind = row[:, None] - row[None, :]
    visible = (req[:, None] == req[None, :]) & (behind >= 0) & ((left < 0) | (behind <= left))
    return masked(q, k, v, visible, softmax_scale, softcap)


class BlockDiagonalCausalMask:
    """As xformers' of the name, and its local attention."""

    def __init__(self, lens, window=0):
        self.lens, self.window = lens, window

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device is not None and kv_seqlen is None
        return cls(q_seqlen)

    def make_local_attention(self, window_size):
        return type(self)(self.lens, window_size)

    def materialize(self, shape):
        ones = [torch.ones(n, n).tril().triu(1 - self.window if self.window else -n)
                for n in self.lens]  # fmt: skip
        return torch.block_diag(*ones).log()


def fmha_with(mask) -> SimpleNamespace:
    """xformers.ops.fmha with a mask of its own or of ours."""

    class FwOp:
        pass

    def partial(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        """Heads [1, n, KV heads, query heads of each, d], and a log-sum-exp [1, KV heads, query
        heads of each, n]."""
        assert op is FwOp and query.shape[:4] == key.shape[:4] == value.shape[:4]
        assert query.shape[3] == 1 or key.stride(3) == value.stride(3) == 0
        n, kv_heads, group, dim = query.shape[1:]
        visible = attn_bias.materialize((n, n)) == 0
        q, k, v = query[0].flatten(1, 2), key[0, :, :, 0], value[0, :, :, 0]
        out, lse = masked(q, k, v, visible, scale)
        return out.view(1, n, kv_heads, group, dim), lse.view(1, kv_heads, group, n)

    return SimpleNamespace(
        memory_efficient_attention_partial=partial, flash=SimpleNamespace(FwOp=FwOp),
        attn_bias=SimpleNamespace(BlockDiagonalCausalMask=mask),
    )  # fmt: skip


FLASH = raw_states.flash_attention(flash_attn_varlen_func, 3)
XFORMERS = raw_states.xformers_by(fmha_with(BlockDiagonalCausalMask))


@pytest.fixture
def always(monkeypatch) -> None:
    """Libraries take steps of few new tokens as well: our own kernel needs a GPU."""
    monkeypatch.setattr(raw_states, "MIN_NEW_TOKENS", 0)


OPTIONS = [{}, {"window": 20}, {"window": 1}, {"sinks": True}, {"window": 37, "sinks": True},
           {"chunk": 1}, {"chunk": 25, "sinks": True}, {"chunk": 64}, {"chunk": 100}]  # fmt: skip
CAPPED = [{"soft_cap": 2.0}, {"window": 37, "soft_cap": 5.0, "sinks": True}]
CASES = [*((FLASH, options) for options in OPTIONS + CAPPED), *((XFORMERS, o) for o in OPTIONS)]


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(("by", "options"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_new_tokens_by_a_library(library, by, options: dict, group_size: int) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), LENS, NEW, group_size=group_size)
    check(library, paged, raw_library=by, **paged.raw, **paged.given(options), wide=True)


@pytest.mark.parametrize("by", [FLASH, XFORMERS], ids=lambda by: by.name)
def test_a_mixed_step_in_two_parts(library, always, by) -> None:
    """Decodes and chunks have launches of their own; those of chunks begin in the middle."""
    metadata = pytest.importorskip("vllm_fibquant.engine.metadata", reason="needs vLLM")
    paged = paged_of(codec_of("fibquant_3bit", 64), [50, 33, 40, 80], [1, 1, 40, 35])
    batch, attend, fresh = paged.split({**paged.raw, "raw_library": by})
    kernels = cuda.Cuda(library)
    out = torch.full_like(paged.query, torch.nan)
    pages = Pages(emu.aligned(paged.cache), paged.codec, None, kernels)
    with_starts = Batch(batch.query_start_loc, batch.seq_lens, batch.block_table,
                        query_starts=batch.host_starts)  # fmt: skip
    step = metadata.FibQuantMetadata(77, with_starts, num_decodes=2, num_decode_tokens=2)
    parts = step.parts
    assert [part.query_starts for _, part in parts] == [[0, 1, 2], [2, 42, 77]]
    for end, part in parts:
        kernels.paged_attention(paged.query[:end], out[:end], pages, part, attend, fresh)
    assert (out.double() - paged.oracle(**paged.raw)).abs().max() < 3e-3


def test_requests_without_new_tokens_and_padding(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [50, 60], [40, 34])
    expected = paged.oracle(**paged.raw)
    paged.query_start_loc = torch.tensor([0, 40, 40, 74], dtype=torch.int32)
    paged.seq_lens = torch.tensor([50, 7, 60], dtype=torch.int32)
    paged.block_table = paged.block_table[[0, 0, 1]]
    padding = torch.full_like(paged.query[:6], torch.nan)
    paged.query = torch.cat((paged.query, padding))
    for by in (FLASH, XFORMERS):
        got = emu.attend(library, paged, raw_library=by, **paged.raw)
        assert (got[:74].double() - expected).abs().max() < 3e-3
        assert got[74:].isnan().all()  # beyond query_start_loc: not written


@pytest.mark.parametrize(("by", "kinds"), [(FLASH, 2), (XFORMERS, 2)], ids=["flash", "xformers"])
def test_what_layers_have_in_common_is_made_once_a_step(by, kinds: int) -> None:
    query, key = torch.randn(40, 4, 64).half(), torch.randn(40, 2, 64).half()
    batch = Batch(torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32),
                  torch.zeros(1, 3, dtype=torch.int32))  # fmt: skip
    seen = set()
    for window in (0, 8, 0, 8):
        attend = Attend(0.125, window, raw_library=by)
        raw_states.of(query, batch, attend, Fresh(key, key))
        seen |= {id(kept) for kept in batch.kept.values()}
    assert len(batch.kept) == len(seen) == kinds


def test_who_attends_what(monkeypatch) -> None:
    """Decode rows, graphs and what a library does not have stay with our own kernel."""

    def batch(*lens: int, known: bool = True) -> Batch:
        starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        made = Batch(starts, torch.full((len(lens),), 99, dtype=torch.int32),
                     torch.zeros(len(lens), 7, dtype=torch.int32))  # fmt: skip
        if not known:
            made.query_start_loc = SimpleNamespace(is_cpu=False)
        return made

    query, plain, within = torch.zeros(33, 4, 64).half(), Attend(0.125), Attend(0.125, chunk=50)
    for by in (FLASH, XFORMERS):
        assert by.takes(query, batch(33), plain) and by.takes(query, batch(1, 33), plain)
        assert not by.takes(query, batch(32, 1), plain)
        assert not by.takes(query, batch(*[1] * 33), plain)
        assert not by.takes(query, batch(33, known=False), plain)
        assert not by.takes(query.float(), batch(33), plain)
        assert not by.takes(torch.zeros(33, 4, 60).half(), batch(33), plain)
        assert not by.takes(torch.zeros(33, 4, 512).half(), batch(33), plain)
        assert by.takes(query, batch(33), Attend(0.125, soft_cap=2.0)) is by.has_soft_cap
        assert by.takes(query, batch(33), within)
        on_gpu = batch(33)
        on_gpu.query_starts, on_gpu.seq_lens = [0, 33], SimpleNamespace(is_cpu=False)
        assert by.takes(query, on_gpu, plain) and not by.takes(query, on_gpu, within)
        on_gpu.contexts = [66]
        assert by.takes(query, on_gpu, within)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        on_gpu = SimpleNamespace(dtype=query.dtype, shape=query.shape, is_cuda=True)
        assert not by.takes(on_gpu, batch(33), plain)
        monkeypatch.undo()


def off_by_one(*args, window_size, **options):
    left, right = window_size
    return flash_attn_varlen_func(*args, window_size=[left + (left > 0), right], **options)


def of_base_two(*args, **options):
    out, lse = flash_attn_varlen_func(*args, **options)
    return out, lse / math.log(2)


@pytest.mark.parametrize("function", [flash_attn_varlen_func, off_by_one, of_base_two])
def test_the_start_up_check_asks_the_library(library, gpu_door, always, function) -> None:  # noqa: F811
    by = raw_states.flash_attention(function, 2)
    how = {"attends_raw": True, "raw_library": by, "all_cases": True}
    codec = codec_of("fibquant_2bit", 64)
    if function is flash_attn_varlen_func:
        result = selfcheck.run_self_check(codec, torch.float16, 4, 2, 16, **how)
        assert result.kernel == "cuda"
        return
    with pytest.raises(RuntimeError, match="kernel cuda must equal the oracle"):
        selfcheck.run_self_check(codec, torch.float16, 4, 2, 16, **how)


def test_an_answer_of_another_layout_is_refused() -> None:
    def transposed(*args, **options):
        out, lse = flash_attn_varlen_func(*args, **options)
        return out, lse.t()

    by = RawLibrary("other", True, raw_states.flash_attention(transposed, 2).call)
    query = torch.randn(40, 4, 64).half()
    batch = Batch(torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32),
                  torch.zeros(1, 3, dtype=torch.int32))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"must give \[40, 4, 64\] and \[4, 40\], got"):
        raw_states.of(query, batch, Attend(0.125, raw_library=by), Fresh(query, query))


# ---- the libraries themselves --------------------------------------------------------------------


def test_vllms_function_takes_the_call() -> None:
    """Its Python file is in every build of vLLM; what it calls is not."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    path = Path(vllm.__path__[0]) / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = inspect.signature(module.flash_attn_varlen_func)
    ours = inspect.signature(flash_attn_varlen_func)
    positional = [name for name in ours.parameters if name != "others"]
    assert positional == list(theirs.parameters)[: len(positional)]
    assert "softmax_lse [optional, if return_softmax_lse=True]: (nheads, total_q_seqlen)" in (
        module.flash_attn_varlen_func.__doc__
    )


def test_xformers_own_masks(library) -> None:
    fmha = pytest.importorskip("xformers.ops.fmha", reason="the extra xformers is not installed")
    real = fmha.attn_bias.BlockDiagonalCausalMask
    ours = inspect.signature(fmha_with(real).memory_efficient_attention_partial).parameters
    theirs = inspect.signature(fmha.memory_efficient_attention_partial).parameters
    assert list(ours) == list(theirs)
    assert isinstance(fmha.flash.FwOp.SUPPORTS_PARTIAL, bool) and fmha.flash.FwOp.VARLEN_LSE_PACKED
    by = raw_states.xformers_by(fmha_with(real))
    paged = paged_of(codec_of("fibquant_2bit", 64), LENS, NEW, group_size=3)
    for window in (0, 20):
        check(library, paged, raw_library=by, **paged.raw, window=window, wide=True)
    assert raw_states.xformers() is None or torch.cuda.is_available()


def test_which_library_serves_a_gpu(monkeypatch) -> None:
    chosen = pytest.importorskip("vllm_fibquant.engine.raw_library", reason="needs vLLM")
    assert chosen.library_for(64, None) is None  # CPUs attend raw tokens themselves
    monkeypatch.setattr(chosen, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(raw_states, "xformers", lambda: XFORMERS)
    said: list[str] = []
    monkeypatch.setattr(chosen.logger, "warning", lambda text, *args: said.append(text % args))

    def found(soft_cap, flash):
        monkeypatch.setattr(chosen.compat, "flash_attention", lambda head_dim: flash)
        chosen._library_for.cache_clear()
        return chosen.library_for(64, soft_cap)

    try:
        assert found(2.0, (flash_attn_varlen_func, 3)).name == "flash-attention"
        assert found(None, None) is XFORMERS and not said
        assert found(2.0, None) is None and "xformers has no soft cap" in said[-1]
        monkeypatch.setattr(raw_states, "xformers", lambda: None)
        assert found(0.0, None) is None and "install it" in said[-1]
    finally:
        chosen._library_for.cache_clear()


def test_the_oracle_is_the_only_judge(library, always) -> None:
    """Without the library's state, or with that of other tokens, outputs differ."""
    paged = paged_of(codec_of("fibquant_2bit", 64), [60], [36])
    right = emu.attend(library, paged, raw_library=FLASH, **paged.raw)
    swapped = {"raw_key": paged.new_value, "raw_value": paged.new_key}
    assert (emu.attend(library, paged, raw_library=FLASH, **swapped) - right).abs().max() > 0.1


def test_what_the_host_knows_must_fit() -> None:
    bounds, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2], [5]))
    for given in ({"query_starts": [0]}, {"contexts": [3, 4]}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must have . entries, got"):
            Batch(bounds, lens, bounds.view(1, 2), **given)
