# SPDX-License-Identifier: Apache-2.0
"""The attention kernel against the oracle, and against itself under every change of batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.paged import make_paged
from vllm_fibquant import ops
from vllm_fibquant.codec.codebook import make_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, CodeSpec
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.keys.key_map import KeyMap

PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]


def codec_of(name: str, head_dim: int) -> KVCodec:
    return KVCodec.from_preset(PRESETS[name], head_dim)


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The model's: some instruction sets attend those of 16 bits with dot products of bytes."""
    return request.param


def check_against_oracle(paged, **options) -> None:
    """Error at most twice that of plain PyTorch in the same dtype."""
    dtype = paged.query.dtype
    exact = paged.oracle(**options)
    plain = paged.oracle(torch.float32, **options).to(dtype)
    error = (paged.attend(**options).double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_and_head_dim(name: str, head_dim: int) -> None:
    paged = make_paged(codec_of(name, head_dim), [70, 1, 33], [1, 1, 4], group_size=3)
    check_against_oracle(paged)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8, 16, 50])
@pytest.mark.parametrize("name", ["fibquant_4bit", "fibquant_3bit", "fibquant_2bit"])
def test_every_group_size(name: str, group_size: int) -> None:
    paged = make_paged(codec_of(name, 64), [90, 40], [1, 3], group_size=group_size)
    check_against_oracle(paged)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 7},
        {"window": 64},
        {"window": 1000},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"raw": True},
        {"raw": True, "window": 20, "soft_cap": 5.0, "sinks": True},
        {"window": 33, "soft_cap": 3.0, "sinks": True},
        {"chunk": 1},
        {"chunk": 33, "soft_cap": 3.0, "sinks": True},
        {"chunk": 600},
        {"raw": True, "chunk": 64},
    ],
    ids=str,
)
def test_options(options: dict, head_dim: int, dtype: torch.dtype) -> None:
    codec, settings = codec_of("fibquant_3bit", head_dim), {"group_size": 3, "dtype": dtype}
    paged = make_paged(codec, [100, 640, 5], [60, 2, 5], **settings)
    check_against_oracle(paged, **paged.given(options))


@pytest.mark.parametrize("block_size", [5, 16, 32, 128])
@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_lengths_around_a_block(block_size: int, delta: int, dtype: torch.dtype) -> None:
    lens = [block_size + delta, 2 * block_size + delta, 1, 512 + delta, 32 + delta]
    codec, settings = codec_of("fibquant_2bit", 64), {"block_size": block_size, "dtype": dtype}
    paged = make_paged(codec, lens, [1] * 5, **settings)
    check_against_oracle(paged)
    whole = make_paged(codec, lens[:2], lens[:2], **settings)
    check_against_oracle(whole)
    check_against_oracle(whole, **whole.raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_model_dtypes(dtype: torch.dtype, raw: bool) -> None:
    paged = make_paged(
        codec_of("fibquant_4bit", 128), [200, 77], [1, 50], group_size=4, dtype=dtype
    )
    check_against_oracle(paged, **(paged.raw if raw else {}))


def test_request_without_new_tokens_and_without_tokens(dtype: torch.dtype) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [40, 30, 20], [1, 1, 1], dtype=dtype)
    expected = paged.attend()
    # The middle request brings no new token this step, and an empty one joins at the end.
    paged.query_start_loc = torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    paged.query = paged.query[[0, 2]]
    paged.seq_lens = torch.cat((paged.seq_lens, torch.zeros(1, dtype=torch.int32)))
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    assert torch.equal(paged.attend(), expected[[0, 2]])


@pytest.mark.parametrize(
    "code",
    [
        CodeSpec(2, 64),
        CodeSpec(4, 1024),
        CodeSpec(4, 64),
        CodeSpec(8, 16),
        CodeSpec(16, 256),
        CodeSpec(2, 64, folded=True),
        CodeSpec(1, 4),
        CodeSpec(2, 16, storage="float16"),
    ],
    ids=lambda c: c.name,
)
def test_codes_without_a_fast_path(code: CodeSpec) -> None:
    """Any subvec_dim and num_codewords work, from a codebook that need not be a good one."""
    table = np.random.default_rng(0).integers(-127, 128, (code.num_rows, code.subvec_dim))
    table = abs(table) if code.folded else table
    book, _ = make_codebook(code, 64, table, 1 / 512, {})
    side = VectorCodec(code, 64, book, make_rotation(64))
    codec = KVCodec(side, side)
    check_against_oracle(make_paged(codec, [70, 5], [1, 2], group_size=3))
    check_against_oracle(make_paged(codec, [70, 5], [4, 2], group_size=3))


# ---- bit-equality -------------------------------------------------------------------------------

LENGTH = 1100  # three splits


LONG = [("fibquant_3bit", 64, 3), ("fibquant_4bit", 128, 1), ("fibquant_2bit", 80, 8)]


@pytest.fixture(params=LONG, ids=str)
def long_request(request, dtype):
    name, head_dim, group_size = request.param
    settings = {"group_size": group_size, "dtype": dtype}
    return make_paged(codec_of(name, head_dim), [LENGTH], [LENGTH], **settings)


def attend_in_chunks(paged, chunks: list[int], **options) -> torch.Tensor:
    out, begin = torch.empty_like(paged.query), 0
    for chunk in chunks:
        end = begin + chunk
        bounds, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, chunk], [end]))
        ops.paged_attention(
            paged.query[begin:end], out[begin:end], paged.pages,
            ops.Batch(bounds, lens, paged.block_table), ops.Attend(paged.scale, **options),
        )  # fmt: skip
        begin = end
    assert begin == len(out)
    return out


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"soft_cap": 3.0}], ids=str)
def test_bit_equal_however_the_prompt_is_cut(long_request, options: dict) -> None:
    whole = attend_in_chunks(long_request, [LENGTH], **options)
    assert torch.equal(whole, attend_in_chunks(long_request, [512, 588], **options))
    assert torch.equal(whole, attend_in_chunks(long_request, [LENGTH - 27] + [1] * 27, **options))
    assert torch.equal(
        whole, attend_in_chunks(long_request, [LENGTH - 48, 7, 1, 30, 10], **options)
    )


def test_bit_equal_for_any_number_of_threads(long_request) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attend_in_chunks(long_request, [LENGTH - 3, 1, 1, 1]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(64, 3), (64, 7), (128, 6), (256, 4)],
    ids=["SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Gemma-3-270m"],
)  # fmt: skip
def test_bit_equal_whatever_else_is_in_the_batch(head_dim: int, group_size: int, dtype) -> None:
    codec = codec_of("fibquant_2bit", head_dim)
    settings = {"group_size": group_size, "dtype": dtype}
    batch = make_paged(codec, [600, 33, 1, 250], [1, 33, 1, 3], **settings)
    together = batch.attend(window=0)
    for req in range(4):
        begin, end = batch.query_start_loc[req : req + 2].tolist()
        alone = torch.empty_like(batch.query[begin:end])
        part = ops.Batch(
            torch.tensor([0, end - begin], dtype=torch.int32), batch.seq_lens[req : req + 1],
            batch.block_table[req : req + 1],
        )  # fmt: skip
        attend = ops.Attend(batch.scale)
        ops.paged_attention(batch.query[begin:end], alone, batch.pages, part, attend)
        assert torch.equal(alone, together[begin:end])


def test_same_call_twice(dtype: torch.dtype) -> None:
    paged = make_paged(codec_of("fibquant_4bit", 64), [700, 20], [1, 1], dtype=dtype)
    assert torch.equal(paged.attend(), paged.attend())


# ---- what must matter, and what must not --------------------------------------------------------


def test_every_stored_byte_matters(dtype: torch.dtype) -> None:
    """Changing any one byte of a record that is attended changes the output."""
    codec = codec_of("fibquant_2bit", 64)
    paged = make_paged(codec, [40], [1], num_kv_heads=1, dtype=dtype)
    before = paged.attend()
    block, offset = divmod(int(paged.slots[17]), 16)
    for byte in range(codec.layout.record_bytes):
        old = int(paged.cache[block, 0, offset, byte])
        paged.cache[block, 0, offset, byte] = old ^ 0x15
        assert not torch.equal(paged.attend(), before), f"byte {byte}"
        paged.cache[block, 0, offset, byte] = old
    assert torch.equal(paged.attend(), before)


def test_block_table_entries_matter(dtype: torch.dtype) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [60], [1], dtype=dtype)
    before = paged.attend()
    paged.block_table[0, 2] = paged.block_table[0, 0]
    assert not torch.equal(paged.attend(), before)


def test_slots_outside_the_sequence_do_not_matter(dtype: torch.dtype) -> None:
    paged = make_paged(codec_of("fibquant_3bit", 64), [37, 70], [1, 5], dtype=dtype)
    before = paged.attend()
    written = torch.zeros(paged.cache.shape[0] * 16, dtype=torch.bool)
    written[paged.slots] = True
    rows = paged.cache.transpose(1, 2).reshape(len(written), 2, -1)
    assert (rows[~written] == 0xFF).all()  # the poison is in place
    rows[~written] = 0x7E  # another NaN
    paged.cache.copy_(rows.view(-1, 16, 2, rows.shape[-1]).transpose(1, 2))
    assert torch.equal(paged.attend(), before)
    assert torch.isfinite(before).all()


def test_blocks_before_the_window_are_not_read(dtype: torch.dtype) -> None:
    """A sliding window's manager frees them: the table may say anything there."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [200], [2], group_size=3, dtype=dtype)
    before = paged.attend(window=50)
    paged.block_table[0, :9] = 2**30  # positions 0 to 143; the window begins at 149
    assert torch.equal(paged.attend(window=50), before)


def test_a_chunk_is_a_window_that_begins_where_the_querys_chunk_does() -> None:
    """The oracle's mask, said in another way: query by query, in a window of its own length."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [200, 37], [90, 37], group_size=3)
    chunked, chunk = paged.oracle(chunk=24), 24
    positions = [*range(110, 200), *range(37)]
    for row, position in enumerate(positions):
        expected = paged.oracle(window=position % chunk + 1)[row]
        assert torch.allclose(chunked[row], expected, atol=1e-12), position
    assert not torch.allclose(chunked, paged.oracle(), atol=1e-3)


def test_blocks_before_the_chunk_are_not_read(dtype: torch.dtype) -> None:
    """vLLM frees them, as those before a window."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [200], [2], group_size=3, dtype=dtype)
    before = paged.attend(chunk=64)
    paged.block_table[0, :12] = 2**30  # positions 0 to 191; the chunk begins at 192
    assert torch.equal(paged.attend(chunk=64), before)


def test_nan_query_spoils_only_its_own_row(dtype: torch.dtype) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 40], [1, 2], dtype=dtype)
    before = paged.attend()
    paged.query[1, 0, 5] = torch.nan
    after = paged.attend()
    assert after[1, 0].isnan().all()
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


# ---- instruction sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["fibquant_k5v3", "fibquant_4bit", "fibquant_2bit", "fibquant_1bit"]
)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_every_instruction_set(isa: str, name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert ops.kernel_name() == f"cpu-{isa}"
    sinks = torch.linspace(-2, 2, 6)
    for query_lens in ([1, 1], [9, 20]):
        settings = {"group_size": 3, "dtype": dtype}
        paged = make_paged(codec_of(name, head_dim), [70, 530], query_lens, **settings)
        check_against_oracle(paged, window=300, soft_cap=4.0, sinks=sinks)
        check_against_oracle(paged, **paged.raw)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 64)}, "query must be"),
        ({"query": torch.zeros(2, 4, 80)}, "query must be"),
        ({"query": torch.zeros(2, 4, 64, dtype=torch.float64)}, "query must be"),
        ({"cache": torch.zeros(4, 2, 16, 35, dtype=torch.uint8)}, "cache must be torch.uint8"),
        ({"seq_lens": torch.tensor([30])}, "seq_lens must be torch.int32"),
        ({"seq_lens": torch.tensor([30, 9, 9], dtype=torch.int32)}, "query_start_loc must be"),
        ({"seq_lens": torch.tensor([30, 0], dtype=torch.int32)}, "at least as many tokens"),
        ({"seq_lens": torch.tensor([30, 4000], dtype=torch.int32)}, "row of block_table holds"),
        ({"block_table": torch.full((2, 3), 99, dtype=torch.int32)}, "inside the cache"),
        ({"block_table": torch.full((2, 3), -1, dtype=torch.int32)}, "inside the cache"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 9], [1, 1])
    for name, value in change.items():
        setattr(paged, name, value)
    with pytest.raises(ValueError, match=message):
        paged.attend()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "at least 0"),
        ({"soft_cap": -1.0}, "at least 0"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"raw_key": torch.zeros(2, 2, 64)}, "given together"),
        (
            dict.fromkeys(("raw_key", "raw_value"), torch.zeros(1, 2, 64)),
            "raw_key must be .*at least 2",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 9], [1, 1])
    with pytest.raises(ValueError, match=message):
        paged.attend(**options)


# ---- what is kept from call to call -------------------------------------------------------------


def test_one_batch_serves_layers_that_differ() -> None:
    """A plan is shared by layers that are alike, and by no others."""
    generator = torch.Generator().manual_seed(1)
    paged = make_paged(codec_of("fibquant_2bit", 64), [1100, 60], [2, 60], group_size=4)
    mean = torch.randn(2, 64, generator=generator)
    layers = [
        (group_size, options, key_map, fresh)
        for options in ({"window": 30}, {}, {"keep_first": 3, "window": 30}, {"soft_cap": 2.0})
        for group_size in (1, 4)
        for key_map in ((None,) if "keep_first" in options else (None, KeyMap(mean, 4)))
        for fresh in ((None,) if "keep_first" in options else (None, paged.fresh, None))
    ]
    threads, batch = torch.get_num_threads(), paged.split({})[0]
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            for group_size, options, key_map, fresh in layers:
                query = torch.randn(62, 2 * group_size, 64, generator=generator)
                pages = ops.pages_of(paged.cache, paged.codec, key_map)
                out, expected = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
                attend = ops.Attend(paged.scale, **options)
                ops.paged_attention(query, out, pages, batch, attend, fresh)
                ops.paged_attention(query, expected, pages, paged.split({})[0], attend, fresh)
                assert torch.equal(out, expected), (group_size, options, key_map)
    finally:
        torch.set_num_threads(threads)


def test_one_layer_serves_batches_that_differ() -> None:
    """Nothing of a call is left in the next: raw tokens, rows, requests, another cache and map."""
    paged = make_paged(codec_of("fibquant_2bit", 64), [70, 40, 33], [2, 3, 1], group_size=2)
    other = make_paged(codec_of("fibquant_2bit", 64), [90], [1], group_size=2, seed=3)
    other.key_map = KeyMap(torch.ones(2, 64), 4)
    attend, kept = ops.Attend(paged.scale), {id(x): x.pages for x in (paged, other)}
    whole, of_other = paged.split({})[0], other.split({})[0]
    fewer = ops.Batch(whole.query_start_loc[:3], whole.seq_lens[:2] - 1, whole.block_table[:2])
    for x, batch, fresh in (
        (paged, whole, paged.fresh), (paged, fewer, None), (paged, whole, None),
        (other, of_other, None), (other, of_other, other.fresh), (paged, fewer, paged.fresh),
    ):  # fmt: skip
        out, expected = torch.zeros(2, *x.query.shape)
        ops.paged_attention(x.query, out, kept[id(x)], batch, attend, fresh)
        ops.paged_attention(x.query, expected, x.pages, batch, ops.Attend(x.scale), fresh)
        assert torch.equal(out, expected)
