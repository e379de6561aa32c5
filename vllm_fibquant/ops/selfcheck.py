# SPDX-License-Identifier: Apache-2.0
"""Start-up check: the kernel this machine will use, against the oracle, before serving.

A miscompiled library, a damaged codebook in memory or an instruction set that misbehaves shows here
as an error, not as fluent nonsense behind a green health check.

A kernel may err twice as much as plain PyTorch does on the same inputs, the oracle in float64 being
right. Plain PyTorch computes in float32 and rounds its output to the model's dtype, as kernels do:
with keys of length 350 it errs a hundred times as much as with short ones, and in bfloat16 all the
way by as much as the outputs themselves, which would allow anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import Attend, Batch, Copied, Copies, Fresh, Pages, reference
from vllm_fibquant.ops.raw_states import RawLibrary

MAX_RECORD_MISMATCH = 0.02
"""Share of records that may differ between kernel and oracle: ties of the two nearest codewords."""

NUM_ULP = 2
"""Units in the last place of the largest output that a kernel may err even where plain PyTorch,
by chance, does not."""

SEQ_LENS, _QUERY_LENS = (1, 37, 130), (1, 4, 21)


@dataclass(frozen=True)
class _Case:
    """One call of attention on the batch.

    Attributes:
        query_lens: new tokens of the requests, of SEQ_LENS.
        table_tokens: tokens that a row of the block table holds at least. A GPU cuts long rows into
            splits.
        window, soft_cap, chunk: as in ops.Attend.
        sinks: whether heads have sinks.
        raw: whether new tokens are attended raw.
        copies: whether half of the first and newest tokens are read from copies.
        keep_first: as in ops.Attend; with queries of their own.
    """

    query_lens: tuple[int, ...] = _QUERY_LENS
    table_tokens: int = 0
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    raw: bool = False
    copies: bool = False
    keep_first: int = 0
    chunk: int = 0


_CPU_CASES = (_Case(),)
# What a GPU launches: decode in one split and in several, prefill (many rows share a decoded
# token), and what models have beside.
_GPU_CASES = (
    _Case(),
    _Case((1, 1, 1)),
    _Case((1, 1, 1), table_tokens=16384),
    _Case((1, 20, 130)),
    _Case((1, 1, 1), table_tokens=16384, window=20, soft_cap=5.0, sinks=True),
    _Case(window=20, soft_cap=5.0, sinks=True),
    _Case((1, 1, 1), table_tokens=16384, chunk=48),
    _Case((1, 20, 130), chunk=48),
)
_RAW_CASES = (
    _Case(raw=True),
    _Case(table_tokens=16384, window=20, sinks=True, raw=True),
    # Of many new tokens, which a library attends where there is one.
    _Case((1, 20, 130), raw=True),
    _Case((1, 37, 100), table_tokens=16384, window=20, soft_cap=5.0, sinks=True, raw=True),
    _Case((1, 37, 100), raw=True, chunk=48),
)
_COPY_CASES = tuple(replace(case, copies=True) for case in _RAW_CASES)
_FIRST_CASES = (
    _Case(window=20, keep_first=4),
    _Case((1, 1, 1), table_tokens=16384, window=20, keep_first=4),
    _Case((1, 20, 130), window=20, keep_first=4),
)
_NUM_FIRST, _NUM_RECENT = 4, 40
"""Tokens of a request that may have copies."""


@dataclass(frozen=True)
class SelfCheckResult:
    """Outcome of one self-check.

    Attributes:
        kernel: name of the kernel checked.
        record_mismatch: share of records that differ from the oracle's.
        error: largest absolute difference of attention outputs from the oracle's in float64.
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
    attends_raw: bool = False,
    raw_library: RawLibrary | None = None,
    has_copies: bool = False,
    keeps_first: bool = False,
    all_cases: bool | None = None,
) -> SelfCheckResult:
    """Encodes and attends a small random batch with the kernel and with the oracle.

    Args:
        codec: the codec to be served.
        dtype: the model's dtype.
        num_q_heads, num_kv_heads, block_size: as the model will use them.
        device: where the kernel runs; None for the CPU. The oracle runs on the CPU.
        key_map: the map of a layer's keys, or None.
        attends_raw: whether new tokens will be attended raw.
        raw_library: as in ops.Attend.
        has_copies: whether some tokens will have copies in 16 bits; checked where kernels make them
            while they encode.
        keeps_first: whether first tokens will be kept beside a window.
        all_cases: whether attention is called in every way that a GPU's kernels differ in, once
            more from a captured CUDA graph where there is a GPU; None on a GPU alone. Queries, keys
            and values are views of one tensor always, as models hand them out.

    Returns:
        The result of the case nearest to its tolerance, when all are within bounds.

    Raises:
        RuntimeError: the kernel disagrees with the oracle; nothing may be served with it.
    """
    # Two KV heads are enough to see a wrong stride, and keep this well under a second.
    group_size, num_kv_heads = num_q_heads // num_kv_heads, min(num_kv_heads, 2)
    if key_map is not None:
        key_map = key_map.first_heads(num_kv_heads)
    generator = torch.Generator().manual_seed(0)
    stored = _store(codec, dtype, num_kv_heads, block_size, device, key_map, has_copies, generator)
    cases: tuple[_Case, ...] = _CPU_CASES
    if all_cases if all_cases is not None else stored.pages.cache.is_cuda:
        cases = _GPU_CASES + (_RAW_CASES if attends_raw else ())
        cases += _COPY_CASES if stored.copied else ()
        cases += _FIRST_CASES if keeps_first else ()
    results = []
    for case in cases:
        shape = sum(case.query_lens), (group_size + 2) * num_kv_heads, codec.head_dim
        new = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        sizes = group_size * num_kv_heads, num_kv_heads, num_kv_heads
        result = _compare(case, stored, new.split(sizes, dim=1), raw_library)
        if not (result.record_mismatch <= MAX_RECORD_MISMATCH and result.error <= result.tolerance):
            raise RuntimeError(
                f"run_self_check: kernel {result.kernel} must equal the oracle (at most "
                f"{MAX_RECORD_MISMATCH:.0%} of records differing, attention error at most twice "
                f"that of plain PyTorch, {result.tolerance:.1e}), got {result.record_mismatch:.1%} "
                f"and {result.error:.1e} with head_dim {codec.head_dim}, {case}; "
                "refusing to serve: rebuild the library, and report this processor if it persists"
            )
        results.append(result)
    return max(results, key=lambda result: result.error / result.tolerance)


@dataclass(frozen=True)
class _Stored:
    """Random tokens as the kernel has stored them.

    Attributes:
        key: the keys, on the CPU.
        block_table: where the tokens' blocks are.
        pages: the kernel's.
        shown: what it has written, for the oracle to read.
        copied: what the kernel has copied, on its device, and the same on the CPU; None if nothing.
        mismatch: share of records that the oracle would have written otherwise.
    """

    key: torch.Tensor
    block_table: torch.Tensor
    pages: Pages
    shown: Pages
    copied: tuple[Copied, Copied] | None
    mismatch: float


def lay_out(
    block_size: int, generator: torch.Generator
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where requests of SEQ_LENS tokens lie in shuffled blocks: how many blocks there are, one more
    than they need, the block table, int32, and each token's position and slot, int64."""
    counts = [-(-n // block_size) for n in SEQ_LENS]
    order = torch.randperm(sum(counts) + 1, generator=generator, dtype=torch.int64)
    blocks = order[:-1].split(counts)
    block_table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in SEQ_LENS])
    req = torch.arange(len(SEQ_LENS)).repeat_interleave(torch.tensor(SEQ_LENS))
    slots = block_table[req, positions // block_size].long() * block_size + positions % block_size
    return len(order), block_table, positions, slots


def _store(
    codec: KVCodec,
    dtype: torch.dtype,
    num_kv_heads: int,
    block_size: int,
    device: torch.device | None,
    key_map: KeyMap | None,
    has_copies: bool,
    generator: torch.Generator,
) -> _Stored:
    num_blocks, block_table, positions, slots = lay_out(block_size, generator)
    shape = 2, len(slots), num_kv_heads, codec.head_dim
    key, value = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if key_map is not None:  # as such a model's are: a mean, and what tells keys apart
        key = (key.float() + key_map.mean_at(positions, torch.float32)).to(dtype)

    # 0xFF bytes are NaN norms: reading a slot nobody wrote would show.
    shape = num_blocks, num_kv_heads, block_size, codec.layout.record_bytes
    expected = Pages(torch.full(shape, 0xFF, dtype=torch.uint8), codec, key_map, ops.REFERENCE)
    pages = ops.pages_of(expected.cache.clone().to(device), codec, key_map)
    made = wanted = None
    if has_copies and "encoding" in pages.kernels.copies_while:
        rows = _half_of_the_rows(len(key), generator)
        made, wanted = (_no_copies(key, rows, at) for at in (device, None))
    # As views of one tensor, whose strides are not those of a tensor of its own.
    keys, values = torch.cat((key, value), 1).to(device).split(num_kv_heads, dim=1)
    ops.encode_kv(keys, values, slots.to(device), pages, positions.to(device), made)
    reference.encode_kv(key, value, slots, expected, positions, wanted)
    if made and wanted:
        for got, copy in zip(made.copies[:2], wanted.copies[:2], strict=True):
            if not torch.equal(got.cpu(), copy):
                raise RuntimeError(
                    f"run_self_check: kernel {pages.kernels.name} must copy tokens as they are, "
                    "got others; refusing to serve: rebuild the library"
                )
    written = pages.cache.cpu()
    mismatch = int((written != expected.cache).any(-1).sum()) / (len(slots) * num_kv_heads)
    shown = Pages(written, codec, key_map, ops.REFERENCE)
    copied = (made, wanted) if made and wanted else None
    return _Stored(key, block_table, pages, shown, copied, mismatch)


def _compare(
    case: _Case, stored: _Stored, new: tuple[torch.Tensor, ...], raw_library: RawLibrary | None
) -> SelfCheckResult:
    """One call of attention by the kernel and by the oracle; `new` as in `_attend`."""
    query, pages = new[0], stored.pages
    bounds = torch.tensor([0, *case.query_lens]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32)
    # Entries behind a request's blocks are never read: vLLM's are left from other requests.
    missing = -(-case.table_tokens // pages.block_size) - stored.block_table.shape[1]
    table = torch.nn.functional.pad(stored.block_table, (0, max(0, missing)), value=-1)
    sinks = torch.linspace(-2, 2, query.shape[1], dtype=torch.float32) if case.sinks else None
    scale = pages.codec.head_dim**-0.5
    how = case.window, case.soft_cap, sinks, case.keep_first
    attend = Attend(scale, *how, raw_library=raw_library, chunk=case.chunk)
    copy_table, given = None, attend
    if case.copies and stored.copied:
        copy_table = _copy_table(stored.copied[1].rows, case.query_lens)
        given, attend = (replace(attend, copies=copied.copies) for copied in stored.copied)
    out = _attend(new, pages, Batch(bounds, seq_lens, table, copy_table), given, case.raw)
    batch = Batch(bounds, seq_lens, stored.block_table, copy_table)
    fresh = _fresh(new, attend, case.raw)
    expected, plain = torch.empty(query.shape, dtype=torch.float64), torch.empty_like(query)
    for found, compute_dtype in ((expected, torch.float64), (plain, torch.float32)):
        reference.paged_attention(query, found, stored.shown, batch, attend, fresh, compute_dtype)
    error, largest = _largest(out - expected), _largest(expected)
    tolerance = 2 * _largest(plain - expected) + NUM_ULP * torch.finfo(query.dtype).eps * largest
    tolerance += _score_rounding(query, stored.key, scale) * largest
    return SelfCheckResult(pages.kernels.name, stored.mismatch, error, tolerance)


def _half_of_the_rows(num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """A row for half of the tokens, -1 for the others."""
    order = torch.randperm(num_tokens, generator=generator, dtype=torch.int64)
    has_row = torch.rand(num_tokens, generator=generator, dtype=torch.float32) < 0.5
    return torch.where(has_row, order, -1).to(torch.int32)


def _no_copies(key: torch.Tensor, rows: torch.Tensor, device: torch.device | None) -> Copied:
    """Where tokens are to be copied; the rows hold what would show."""
    dtype = torch.bfloat16 if key.dtype == torch.float32 else key.dtype
    new = torch.full((2, *key.shape), 1e4, dtype=dtype, device=device)
    return Copied(Copies(new[0], new[1], _NUM_FIRST), rows.to(device))


def _copy_table(rows: torch.Tensor, query_lens: tuple[int, ...]) -> torch.Tensor:
    """`Batch.copy_table` of tokens that are copied to `rows`."""
    table = torch.full((len(SEQ_LENS), _NUM_FIRST + _NUM_RECENT), -1, dtype=torch.int32)
    begin = 0
    for row, seq_len, query_len in zip(table, SEQ_LENS, query_lens, strict=True):
        end = begin + seq_len - query_len
        num_first = min(end - begin, _NUM_FIRST)
        num_recent = min(end - begin - num_first, _NUM_RECENT)
        row[:num_first] = rows[begin : begin + num_first]
        row[len(row) - num_recent :] = rows[end - num_recent : end]
        begin += seq_len
    return table


def _attend(
    new: tuple[torch.Tensor, ...], pages: Pages, batch: Batch, attend: Attend, raw: bool
) -> torch.Tensor:
    """The kernel's outputs, on the CPU; on a GPU those of a replayed graph.

    Args:
        new: queries, keys and values of the new tokens, on the CPU as batch and attend are.
        pages: on any device.
        raw: whether new tokens are attended raw.

    Raises:
        RuntimeError: a graph's outputs are not those of the call that was not captured.
    """
    device = pages.cache.device
    query, key, value = torch.cat(new, 1).to(device).split([x.shape[1] for x in new], dim=1)
    tensors = batch.query_start_loc, batch.seq_lens, batch.block_table, batch.copy_table
    starts = contexts = None
    if raw:
        starts = batch.host_starts
        contexts = (batch.seq_lens - batch.query_start_loc.diff()).tolist()
    on_device = Batch(
        *(x if x is None else x.to(device) for x in tensors),  # type: ignore[arg-type]
        query_starts=starts,
        contexts=contexts,
    )
    if attend.sinks is not None:
        attend = replace(attend, sinks=attend.sinks.to(device))
    fresh = _fresh((query, key, value), attend, raw)
    out = torch.full(query.shape, torch.nan, dtype=query.dtype, device=device)
    ops.paged_attention(query, out, pages, on_device, attend, fresh)
    library = attend.raw_library if raw else None
    if not pages.cache.is_cuda or (library and library.takes(query, on_device, attend)):
        return out.cpu()  # libraries are not asked in what is captured
    graph, replayed = torch.cuda.CUDAGraph(), torch.full_like(out, torch.nan)
    with torch.cuda.graph(graph):
        ops.paged_attention(query, replayed, pages, on_device, attend, fresh)
    replayed.fill_(torch.nan)
    graph.replay()
    if not torch.equal(replayed, out):
        raise RuntimeError(
            "run_self_check: a replayed CUDA graph must give the outputs of the call it captured, "
            "got others; refusing to serve: give --enforce-eager, and report this device"
        )
    return replayed.cpu()


def _fresh(new: tuple[torch.Tensor, ...], attend: Attend, raw: bool) -> Fresh | None:
    """What a case's new tokens bring beside their queries."""
    if raw:
        return Fresh(*new[1:])
    return Fresh(first_query=new[0].flip(-1)) if attend.keep_first else None


def _largest(x: torch.Tensor) -> float:
    return float(x.double().abs().max())


def _score_rounding(query: torch.Tensor, key: torch.Tensor, scale: float) -> float:
    """What rounding the largest possible score to float32 may change in a weight, as a share.

    Kernels sum a score's parts in another order than plain PyTorch, of transformed keys in other
    coordinates, and add what all keys have in common, <q, mean>, as one number to the scores of
    mapped keys. That rounding is common to them and stands against the first tokens, which are
    coded without it; plain PyTorch rounds every key's score by itself, which averages.
    """
    largest = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * scale
    return torch.finfo(torch.float32).eps * float(largest)
