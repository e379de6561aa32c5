# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the oracle: on a GPU where there is one, else interpreted on the CPU.

Not collected by name: tests/ops/test_triton.py runs this file in a process of its own, because
Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import pytest
import torch

from tests.paged import check_records, make_paged, use_reference
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.kernels import attention, encode
from vllm_fibquant.ops import Attend, Batch, Pages, gpu, kernels, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]


def codec_of(name: str, head_dim: int) -> KVCodec:
    return KVCodec.from_preset(PRESETS[name], head_dim)


def paged_of(*args, **options):
    with use_reference():  # needs no compiled library
        return make_paged(*args, **options)


def pages_on(paged) -> Pages:
    return Pages(paged.cache.to(DEVICE), paged.codec, None, gpu.TRITON)


def attend(paged, num_splits: int = 3, **options) -> torch.Tensor:
    """The Triton kernel's answer, on the CPU, from scratch memory that holds NaN."""
    out = torch.full_like(paged.query, torch.nan, device=DEVICE)
    attention.paged_attention(
        paged.query.to(DEVICE), out, pages_on(paged), *paged.split(options, DEVICE),
        num_splits=num_splits, allocate=lambda n, at: torch.full((n,), torch.nan, device=at),
    )  # fmt: skip
    return out.cpu()


def check_attention(paged, **options) -> None:
    """Error at most twice that of plain PyTorch in the model's dtype."""
    dtype = paged.query.dtype
    splits = options.pop("num_splits", 3)
    exact = paged.oracle(**options)
    plain = paged.oracle(dtype, **options).to(dtype)
    error = (attend(paged, splits, **options).double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2e-6
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 1), (64, 8), (128, 3), (128, 4)])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset(name: str, head_dim: int, group_size: int) -> None:
    paged = paged_of(codec_of(name, head_dim), [70, 1, 33], [1, 1, 2], group_size=group_size)
    check_attention(paged)


@pytest.mark.parametrize("head_dim", [80, 96, 112, 192, 256])
def test_every_head_dim(head_dim: int) -> None:
    check_attention(paged_of(codec_of("fibquant_k5v3", head_dim), [40, 7], [1, 3]))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 20},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"raw": True},
        {"raw": True, "window": 20, "soft_cap": 5.0, "sinks": True},
        {"chunk": 1},
        {"chunk": 33, "soft_cap": 5.0, "sinks": True},
        {"raw": True, "chunk": 33},
        {"raw": True, "chunk": 90},
    ],
    ids=str,
)
def test_options(options: dict) -> None:
    paged = paged_of(codec_of("fibquant_3bit", 64), [50, 101, 5], [20, 2, 5], group_size=3)
    check_attention(paged, **paged.given(options))


@pytest.mark.parametrize("block_size", [5, 16, 64])
@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_lengths_around_a_block(block_size: int, num_splits: int) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 1, 33]
    paged = paged_of(codec_of("fibquant_2bit", 64), lens, [1] * 5, block_size=block_size)
    check_attention(paged, num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fibquant_k5v3", "fibquant_4bit", "fibquant_1bit"])
def test_model_dtypes(name: str, dtype: torch.dtype) -> None:
    paged = paged_of(codec_of(name, 64), [90, 40], [1, 9], group_size=4, dtype=dtype)
    check_attention(paged)
    check_attention(paged, **paged.raw)


def test_request_without_new_tokens_and_without_tokens() -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 30, 20], [1, 1, 1])
    expected = attend(paged)
    paged.query_start_loc = torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    paged.query = paged.query[[0, 2]]
    paged.seq_lens = torch.cat((paged.seq_lens, torch.zeros(1, dtype=torch.int32)))
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    # The interpreter's matrix product rounds a row by its place in the tile.
    torch.testing.assert_close(attend(paged), expected[[0, 2]], rtol=1e-5, atol=1e-6)


def test_every_stored_byte_matters_and_no_other() -> None:
    codec = codec_of("fibquant_2bit", 64)
    paged = paged_of(codec, [40], [1], num_kv_heads=1)
    before = attend(paged)
    assert torch.equal(attend(paged), before) and torch.isfinite(before).all()
    block, offset = divmod(int(paged.slots[17]), 16)
    for byte in range(codec.layout.record_bytes):
        old = int(paged.cache[block, 0, offset, byte])
        paged.cache[block, 0, offset, byte] = old ^ 0x15
        assert not torch.equal(attend(paged), before), f"byte {byte}"
        paged.cache[block, 0, offset, byte] = old
    written = torch.zeros(paged.cache.shape[0] * 16, dtype=torch.bool)
    written[paged.slots] = True
    rows = paged.cache.view(len(written), -1)
    rows[~written] = 0x7E  # another NaN
    assert torch.equal(attend(paged), before)
    paged.block_table[0, [0, 2]] = paged.block_table[0, [2, 0]]
    assert not torch.equal(attend(paged), before)


def test_blocks_before_the_window_are_not_read() -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [100], [2], group_size=3)
    before = attend(paged, window=30)
    paged.block_table[0, :4] = 2**30
    assert torch.equal(attend(paged, window=30), before)


def test_blocks_before_the_chunk_are_not_read() -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [100], [4], group_size=3)
    before = attend(paged, chunk=32)
    paged.block_table[0, :6] = 2**30  # positions 0 to 95
    assert torch.equal(attend(paged, chunk=32), before)


@pytest.mark.parametrize("bad", [-5, 2**30])
def test_a_block_outside_the_cache_gives_nan(bad: int) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 40], [1, 1])
    before = attend(paged)
    paged.block_table[0, 1] = bad
    after = attend(paged)
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


def test_nan_query_spoils_only_its_own_row() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        paged = paged_of(codec_of("fibquant_2bit", 64), [30, 40], [1, 2], dtype=dtype)
        before = attend(paged)
        paged.query[1, 0, 5] = torch.nan
        after = attend(paged)
        assert after[1, 0].isnan().all()
        after[1, 0] = before[1, 0]
        assert torch.equal(after, before)


def test_raw_token_states_are_causal_attention() -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 3], [5, 3], group_size=2)
    batch, layer, fresh = paged.split(paged.raw, DEVICE)
    states = attention.raw_token_states(paged.query.to(DEVICE), batch, layer, fresh)
    o, m, l = (x.cpu() for x in states)  # noqa: E741
    got = (o / l[:, None]).view(paged.query.shape)
    for begin, end in ((0, 5), (5, 8)):
        q, k, v = (
            x[begin:end].transpose(0, 1)
            for x in (
                paged.query,
                paged.new_key.repeat_interleave(2, 1),
                paged.new_value.repeat_interleave(2, 1),
            )
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=paged.scale
        )
        torch.testing.assert_close(got[begin:end].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
    assert m.isfinite().all()


# ---- the door -----------------------------------------------------------------------------------


def test_the_door_takes_and_refuses() -> None:
    codec = codec_of("fibquant_2bit", 64)
    paged = paged_of(codec, [40, 20], [1, 2])
    pages = pages_on(paged)
    query = paged.query.to(DEVICE)
    out = torch.zeros_like(query)

    def call(query=query, out=out, pages=pages, **options):
        ops.paged_attention(query, out, pages, *paged.split(options, DEVICE))

    call()
    assert (out.cpu().double() - paged.oracle()).abs().max() < 1e-5
    copies = Attend(1.0, copies=ops.Copies(*[torch.zeros(3, 2, 64, device=DEVICE)] * 2, 1))
    for changes, message in (
        ({"query": query[:, :3]}, "query must be"),
        ({"out": out.half()}, "out must be"),
        ({"window": -1}, "window, soft_cap, keep_first"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"keep_first": 1}, "keep_first .* must be left out with the triton kernels"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(ValueError, match="copies .* must be left out with the triton kernels"):
        ops.paged_attention(query, out, pages, paged.split({}, DEVICE)[0], copies)
    with pytest.raises(ValueError, match="cache must be"):
        Pages(pages.cache[..., 1:], codec, None, gpu.TRITON)
    for changes, message in (
        ({"seq_lens": paged.seq_lens.long()}, "seq_lens must be"),
        ({"block_table": paged.block_table[:1]}, "block_table must be .*at least 2"),
    ):
        fields = ("query_start_loc", "seq_lens", "block_table")
        with pytest.raises(ValueError, match=message):
            Batch(**{name: getattr(paged, name) for name in fields} | changes)
    key = torch.randn(3, 2, 64).to(DEVICE)
    slots = torch.tensor([0, -1, 5]).to(DEVICE)
    assert ops.encode_kv(key, key, slots, pages) == 0
    with pytest.raises(ValueError, match="slot_mapping must be"):
        ops.encode_kv(key, key, slots.int(), pages)


# ---- encode -------------------------------------------------------------------------------------


def encode_both(codec, key, value, slots):
    """Caches after the kernel and after the oracle, and the kernel's counters."""
    shape = (4, key.shape[1], 16, codec.layout.record_bytes)
    got, expected = (torch.full(shape, 0xFF, dtype=torch.uint8) for _ in range(2))
    got, counters = got.to(DEVICE), kernels.device_counters(DEVICE).zero_()
    on = (x.to(DEVICE) for x in (key, value, slots))
    encode.encode_kv(*on, Pages(got, codec, None, gpu.TRITON))
    inside = torch.where(slots < 64, slots, -1)
    oracle = Pages(expected, codec, None, ops.REFERENCE)
    count = reference.encode_kv(key, value, inside, oracle)
    assert int(counters[0]) == count
    return got.cpu(), expected, counters.tolist()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_records_equal_the_oracles(name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    key, value = torch.randn(2, 21, 2, head_dim, generator=torch.Generator().manual_seed(2)) * 3
    key[3, 1, 7] = float("nan")
    value[4, 0, 8] = -float("inf")
    key[5], value[6], key[7, 0, 1] = 0.0, 1e-41, 3e38
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:20]
    slots[9], slots[11] = -1, 64  # skipped; outside the cache
    got, expected, counters = encode_both(codec, key, value, slots)
    assert counters == [2, 2]
    check_records(codec, got, expected)


@pytest.mark.parametrize("gain", ["norm", "preserve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gain_rules_and_strided_half_inputs(gain: str, dtype: torch.dtype) -> None:
    preset = PRESETS["fibquant_3bit"].with_overrides(
        {"key": {"gain": gain}, "value": {"gain": gain}}
    )
    codec = KVCodec.from_preset(preset, 64)
    qkv = torch.randn(20, 8 * 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    key, value = qkv[:, 256:384].view(20, 2, 64), qkv[:, 384:].view(20, 2, 64)
    got, expected, _ = encode_both(codec, key, value, torch.arange(20) + 5)
    check_records(codec, got, expected)
