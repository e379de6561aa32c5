# SPDX-License-Identifier: Apache-2.0
"""Batches as vLLM's Model Runner V2 builds them, CUDA's default, handed to our door.

V2 needs a GPU; what it hands out does not. Its own `InputBatch` and `build_attn_metadata` run here
on CPU tensors, with our builder, and the emulated CUDA kernels or the CPU's answer.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests import emulated as emu
from tests.paged import make_paged, use_reference
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import attention, layers, raw_library
from vllm_fibquant.engine.device_pool import DevicePool
from vllm_fibquant.engine.metadata import (
    FibQuantMetadata,
    FibQuantMetadataBuilder,
    _positions_of,
)
from vllm_fibquant.ops import Attend, Batch, Pages
from vllm_fibquant.ops.cuda import Cuda
from vllm_fibquant.options import Retain, parse_options

pytestmark = pytest.mark.versions

STALE = 2**30
"""A block number that another request may have left behind: nobody may follow it."""


def builder(
    threshold: int | None, has_maps: bool = False, drafts: object = None
) -> FibQuantMetadataBuilder:
    """Our builder as a GPU has it, of no layers."""
    made = FibQuantMetadataBuilder.__new__(FibQuantMetadataBuilder)
    made.reorder_batch_threshold = threshold
    made.retain = made._pool = made._plan_probe = made._device_reader = made._gone = None
    made._max_model_len = 64
    made._needs_positions, made._counts_steps = has_maps, False
    layer = SimpleNamespace(attends_raw=True, attend=Attend(1.0, chunk=16))
    config = SimpleNamespace(speculative_config=drafts)
    made._host_lists = raw_library.host_lists(config, [layer])
    made._positions = torch.full((64,), -7) if has_maps else None
    made._with_sinks = []
    return made


def metadata_of_v2(
    query_lens: list[int],
    paged,
    num_reqs: int,
    num_tokens: int,
    threshold: int | None = 1,
    made: FibQuantMetadataBuilder | None = None,
) -> FibQuantMetadata:
    """The metadata of a batch padded to num_reqs requests and num_tokens tokens."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.utils import AttentionGroup

    max_reqs, max_tokens = 8, 64
    buffers = InputBuffers(max_reqs, max_tokens, torch.device("cpu"))
    dummy = InputBatch.make_dummy(len(query_lens), sum(query_lens), buffers)
    # As the runner prepares a step: bounds behind the batch repeat the last, lengths are 0.
    n = len(query_lens)
    buffers.query_start_loc[: n + 1] = torch.tensor([0, *query_lens]).cumsum(0)
    buffers.query_start_loc[n + 1 :] = sum(query_lens)
    buffers.seq_lens[:n] = paged.seq_lens
    buffers.seq_lens[n:] = 0
    assert dummy.num_tokens == sum(query_lens)
    width = paged.block_table.shape[1]
    table = torch.full((max_reqs, width + 5), STALE, dtype=torch.int32)
    for req, seq_len in enumerate(paged.seq_lens.tolist()):
        used = -(-seq_len // 16)
        table[req, :used] = paged.block_table[req, :used]
    group = AttentionGroup(None, ["layer"], None, 0)
    group.metadata_builders = [made or builder(threshold)]
    config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)])
    found = build_attn_metadata(
        attn_groups=[[group]], num_reqs=num_reqs, num_tokens=num_tokens,
        query_start_loc_gpu=buffers.query_start_loc[: num_reqs + 1],
        query_start_loc_cpu=buffers.query_start_loc[: num_reqs + 1].clone(),
        max_query_len=max(query_lens), seq_lens=buffers.seq_lens, max_seq_len=512,
        block_tables=[table[:num_reqs]], slot_mappings=torch.full((1, max_tokens), -1),
        kv_cache_config=config, seq_lens_cpu_upper_bound=buffers.seq_lens.clone(),
    )  # fmt: skip
    return found["layer"]


def attend(library, paged, metadata: FibQuantMetadata) -> torch.Tensor:
    """What the emulated CUDA kernels write, part by part, into outputs of NaN."""
    rows = metadata.num_tokens
    query = torch.zeros(rows, *paged.query.shape[1:], dtype=paged.query.dtype)
    query[: len(paged.query)] = paged.query
    out = torch.full_like(query, torch.nan)
    kernels = Cuda(library)
    pages = Pages(emu.aligned(paged.cache), paged.codec, None, kernels)
    for end, batch in metadata.parts:
        kernels.paged_attention(query[:end], out[:end], pages, batch, Attend(paged.scale))
    return out


# name: (new tokens, tokens of each request, padded requests, padded tokens)
BATCHES = {
    "PIECEWISE: tokens are not padded": ([1, 1, 20], [40, 17, 50], 3, 22),
    "eager, prefill alone": ([9, 20], [9, 33], 2, 29),
    "FULL: requests are padded": ([1, 1, 1], [40, 1, 33], 8, 8),
    "FULL: speculation, padded": ([3, 3], [40, 30], 4, 12),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_kernels_read_v2s_batches(name: str) -> None:
    query_lens, seq_lens, num_reqs, num_tokens = BATCHES[name]
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        paged = make_paged(codec, seq_lens, query_lens, group_size=4, dtype=torch.float16)
    metadata = metadata_of_v2(query_lens, paged, num_reqs, num_tokens)
    assert metadata.num_tokens == num_tokens and metadata.batch.num_reqs == num_reqs
    out, real = attend(emu.emulated(), paged, metadata), sum(query_lens)
    assert (out[:real].double() - paged.oracle()).abs().max() < 3e-3
    assert out[real:].isnan().all(), "rows behind the batch are not written"


def test_decodes_beside_a_chunk_have_a_launch_of_their_own() -> None:
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        paged = make_paged(codec, [40, 17, 50], [1, 1, 20], dtype=torch.float16)
    metadata = metadata_of_v2([1, 1, 20], paged, 3, 22)
    assert [(end, batch.num_reqs) for end, batch in metadata.parts] == [(2, 2), (22, 1)]
    assert metadata.parts[1][1].query_start_loc.tolist() == [2, 22]
    # Known to the host, as a library asks.
    assert metadata.parts[1][1].query_starts == [2, 22]
    assert metadata.parts[1][1].contexts == [30]
    drafted = metadata_of_v2([1, 1, 20], paged, 3, 22, made=builder(1, drafts="ngram"))
    assert drafted.batch.query_starts == [0, 1, 2, 22] and drafted.batch.contexts is None
    whole = metadata_of_v2([1, 1, 20], paged, 3, 22, threshold=None)
    assert [(end, batch.num_reqs) for end, batch in whole.parts] == [(22, 3)]
    assert len(metadata_of_v2([1, 1], paged_of_two(), 2, 2).parts) == 1


def test_positions_stay_in_one_place_for_captured_graphs() -> None:
    made = builder(1, has_maps=True)
    first = metadata_of_v2([1, 1], paged_of_two(), 2, 2, made=made).positions
    assert first[:2].tolist() == [39, 16] and first[2:].unique().tolist() == [-7]
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        paged = make_paged(codec, [40, 30], [3, 3], dtype=torch.float16)
    second = metadata_of_v2([3, 3], paged, 4, 12, made=made).positions
    assert second is first and first[:6].tolist() == [37, 38, 39, 27, 28, 29]
    made._positions = first[:3]
    with pytest.raises(ValueError, match=r"positions must be .*at most 3.* got .*\[12\]"):
        metadata_of_v2([3, 3], paged, 4, 12, made=made)


def test_how_far_queries_turn_back_stays_in_one_place() -> None:
    """Captured graphs read it, so it is there for short requests too; padding stays in range."""
    made = builder(1)
    made.retain, made._gone = Retain(first=4, recent=10), torch.full((64,), -7)
    first = metadata_of_v2([1, 1], paged_of_two(), 4, 4, made=made).num_gone
    assert first is made._gone and first[:2].tolist() == [26, 3]
    assert int(first[:4].min()) >= 0 and int(first[:4].max()) < made._max_model_len
    made.retain = Retain(first=4, recent=600)
    again = metadata_of_v2([1, 1], paged_of_two(), 2, 2, made=made).num_gone
    assert again is first and first[:2].tolist() == [0, 0]
    made._gone = None  # as on a CPU
    assert metadata_of_v2([1, 1], paged_of_two(), 2, 2, made=made).num_gone is None


@pytest.mark.parametrize("query_len", [1, 3])
def test_a_drafts_metadata_follows_its_buffers(query_len: int) -> None:
    """vLLM captures a draft's steps in one graph, where only what is on the device moves on."""
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    query_lens, num_steps = [query_len] * 2, 3
    with use_reference():
        paged = make_paged(codec, [34, 18], query_lens, group_size=4, dtype=torch.float16)

    def at_step(step: int):
        return replace(paged, seq_lens=paged.seq_lens - (num_steps - 1 - step))

    made = builder(1, has_maps=True)
    metadata = metadata_of_v2(query_lens, at_step(0), 4, 4 * query_len, made=made)
    real = 2 * query_len
    for step in range(num_steps):
        fresh = metadata_of_v2(
            query_lens, at_step(step), 4, 4 * query_len, made=builder(1, has_maps=True)
        )
        metadata.batch.seq_lens[:] = fresh.batch.seq_lens
        metadata.batch.block_table[:] = fresh.batch.block_table  # second blocks begin at step 1
        made.update_draft_decode_metadata(metadata)
        assert metadata.positions is made._positions
        assert torch.equal(metadata.positions[:real], fresh.positions[:real])
        got, expected = (attend(emu.emulated(), paged, m)[:real] for m in (metadata, fresh))
        assert torch.equal(got, expected) and got.isfinite().all()
    made._positions.fill_(-7)
    assert metadata.positions[:real].unique().tolist() == [-7], "the buffer is the metadata's"
    # Without numbers it runs as well: nothing is read back while a graph is captured.
    bounds, lens = (torch.empty(n, dtype=torch.int32, device="meta") for n in (5, 4))
    assert _positions_of(bounds, lens, 12).shape == (12,)


def test_which_builders_let_drafts_be_captured_whole(monkeypatch) -> None:
    from vllm_fibquant.engine import metadata

    for name in ("check_kernels", "DeviceReader"):
        monkeypatch.setattr(metadata, name, lambda *args: None)
    attend, options = Attend(1.0), parse_options("fibquant_2bit", {"fibquant": {"mode": "exact"}})
    impl = SimpleNamespace(attend=attend, options=options, key_map=None, attends_raw=False)
    monkeypatch.setattr(metadata, "get_layers_from_vllm_config",
                        lambda *args: {"draft": SimpleNamespace(impl=impl)})  # fmt: skip
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64), speculative_config=None,
        model_config=SimpleNamespace(max_model_len=64, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )  # fmt: skip
    spec = SimpleNamespace(block_size=16)

    def is_followed(device: str = "cuda") -> bool:
        made = FibQuantMetadataBuilder(spec, ["draft"], config, torch.device(device))
        return made.supports_draft_decode_metadata_update

    assert is_followed() and not is_followed("cpu")
    impl.attend = replace(attend, sinks=torch.zeros(1))
    assert not is_followed(), "sinks are compared with the weights by Python"
    impl.attend = attend
    monkeypatch.setattr(metadata, "planner_of_probes", lambda *args: print)
    assert not is_followed(), "the monitor plans each step"


def paged_of_two():
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        return make_paged(codec, [40, 17], [1, 1], dtype=torch.float16)


@pytest.mark.parametrize("name", BATCHES)
def test_copies_of_a_batch_are_planned(name: str) -> None:
    """Padded requests have none, and each part has the lines of its requests."""
    query_lens, seq_lens, num_reqs, num_tokens = BATCHES[name]
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    with use_reference():
        paged = make_paged(codec, seq_lens, query_lens)
    pool = DevicePool(512, 2, 8, 16, 8, 64, torch.device("cpu"), emu.emulated().plan_copies)
    # As if every token before the new ones had come in one step.
    contexts = torch.tensor(seq_lens) - torch.tensor(query_lens)
    old = torch.cat([torch.arange(n) < c for n, c in zip(seq_lens, contexts, strict=True)])
    bounds = torch.tensor([0, *contexts.tolist()]).cumsum(0).int()
    for req in range(len(seq_lens)):
        own = paged.slots[old][bounds[req] : bounds[req + 1]]
        for begin in range(0, len(own), 64):
            count = len(own[begin : begin + 64])
            loc, lens = torch.tensor([[0, count], [begin + count, 0]]).int()
            pool.step(loc, lens[:1], paged.block_table[req : req + 1], own[begin : begin + 64])
    made = builder(1)
    made._pool = pool
    metadata = metadata_of_v2(query_lens, paged, num_reqs, num_tokens, made=made)
    table = metadata.batch.copy_table
    assert table is not None and table.shape == (num_reqs, 10)
    assert (table[len(seq_lens) :] == -1).all() and metadata.copy_rows is pool._rows
    expected = [min(c, 10) for c in contexts.tolist()]
    assert (table[: len(seq_lens)] >= 0).sum(1).tolist() == expected
    assert torch.equal(torch.cat([part.copy_table for _, part in metadata.parts]), table)


def test_dummy_runs_store_nothing_and_are_not_captured(monkeypatch) -> None:
    """vLLM's dummy runs hand out slots of -1 and no metadata: there are no positions to read."""
    impl = attention.FibQuantImpl.__new__(attention.FibQuantImpl)
    impl.key_map, impl.attend = object(), Attend(1.0)
    context = SimpleNamespace(attn_metadata=None)
    monkeypatch.setattr(attention, "get_forward_context", lambda: context)
    key, slots = torch.zeros(2, 1, 64), torch.full((2,), -1)
    impl.do_kv_cache_update(SimpleNamespace(layer_name="a"), key, key, torch.zeros(1), slots)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="must not be captured without attention metadata"):
        impl.do_kv_cache_update(SimpleNamespace(layer_name="a"), key, key, torch.zeros(1), slots)


def test_pages_on_which_graphs_were_measured_are_let_go(monkeypatch) -> None:
    """vLLM measures CUDA graphs on pages of their own and sizes the real ones afterwards."""
    impl = attention.FibQuantImpl.__new__(attention.FibQuantImpl)
    impl.attend, impl.key_map, impl._pages = Attend(1.0), None, None
    impl.codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    cache = torch.zeros(4, 2, 16, impl.codec.layout.record_bytes, dtype=torch.uint8)
    pages = impl.pages(cache)
    batch = Batch(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]])))
    query = torch.zeros(1, 2, 64)
    ops.paged_attention(query, query.clone(), pages, batch, impl.attend)
    held = weakref.ref(pages)
    del pages
    assert held() is not None and impl.attend.kept is not None
    monkeypatch.setattr(layers, "our_layers", lambda config: {"layer": impl})
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for device in ("cpu", "cuda"):
        layers.release_memory(SimpleNamespace(device_config=SimpleNamespace(device_type=device)))
        assert held() is None and len(emptied) == (device == "cuda")
