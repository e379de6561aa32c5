# SPDX-License-Identifier: Apache-2.0
"""Copies of tokens in 16 bits, CUDA kernels against the oracle: read in the place of codes, written
while new tokens are encoded."""

from __future__ import annotations

import pytest
import torch

from tests import emulated as emu
from tests.ops.test_copies import make_copies
from tests.ops.test_cuda_emulated import OPTIONS, PRESET_NAMES, codec_of, paged_of
from tests.ops.test_cuda_mapped import KINDS, map_of, mapped_of
from vllm_fibquant import ops
from vllm_fibquant.ops import Copied, Copies, Pages, cuda, reference, selfcheck


def check(library, paged, *, copies, num_splits=2, wide=False, **options) -> torch.Tensor:
    """Error at most twice that of plain PyTorch in the model's dtype."""
    given = {"copies": copies, **paged.raw, **options}
    exact = paged.oracle(**given)
    plain = paged.oracle(paged.query.dtype, **given).to(paged.query.dtype)
    launch = {"num_splits": num_splits, "wide": wide, "raw_states": emu.raw_states}
    got = emu.attend(library, paged, **launch, **given)
    error = (got.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2e-4
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    return got


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset(library, name: str, group_size: int) -> None:
    paged = paged_of(codec_of(name, 64), [90, 1, 33], [1, 1, 2], group_size=group_size)
    check(library, paged, copies=make_copies(paged, 4, 40, torch.float16, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", *KINDS])
@pytest.mark.parametrize("wide", [False, True])
def test_mapped_keys(library, kind: str, wide: bool, dtype: torch.dtype) -> None:
    args = "fibquant_3bit", 64, [70, 3, 33, 6], [1, 2, 5, 4]
    if kind == "plain":
        paged = paged_of(codec_of(*args[:2]), *args[2:], group_size=3, dtype=dtype)
    else:
        paged = mapped_of(*args, kind=kind, group_size=3, dtype=dtype)
    for share in (1.0, 0.5):
        copies = make_copies(paged, 4, 24, dtype, share)
        check(library, paged, copies=copies, wide=wide)


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("name", ["fibquant_k5v3", "fibquant_1bit"])
def test_every_head_dim(library, name: str, head_dim: int) -> None:
    for wide in (False, True):
        paged = paged_of(codec_of(name, head_dim), [60, 23], [1, 5], num_kv_heads=1, group_size=5)
        copies = make_copies(paged, 2, 32, torch.bfloat16, 0.7)
        check(library, paged, copies=copies, wide=wide)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(library, options: dict, wide: bool) -> None:
    paged = paged_of(codec_of("fibquant_3bit", 64), [50, 101, 5], [9, 2, 5], group_size=3)
    copies = make_copies(paged, 4, 40, torch.float16, 0.7)
    check(library, paged, copies=copies, num_splits=3, wide=wide, **paged.given(options))


@pytest.mark.parametrize(("num_first", "num_recent"), [(0, 1), (1, 0), (4, 0), (0, 64), (16, 100)])
@pytest.mark.parametrize("num_splits", [1, 5])
def test_sizes(library, num_first: int, num_recent: int, num_splits: int) -> None:
    """Windows shorter than a chunk, longer than a context, and of no token."""
    lens = [130, 64, 1, 90, 17, 16, 15, 33]
    paged = paged_of(codec_of("fibquant_2bit", 64), lens, [1, 3, 1, 90, 1, 1, 1, 2], num_kv_heads=1)
    copies = make_copies(paged, num_first, num_recent, torch.float16)
    check(library, paged, copies=copies, num_splits=num_splits)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_copies_of_everything_leave_no_trace_of_codes(library, kind: str) -> None:
    paged = paged_of(codec_of("fibquant_1bit", 128), [70, 40], [1, 7], group_size=4)
    if kind == "all":
        paged = mapped_of("fibquant_1bit", 128, [70, 40], [1, 7], group_size=4)
    copies = make_copies(paged, 4, 70, torch.float16)
    before = check(library, paged, copies=copies)
    paged.cache.random_(0, 60)  # other codes, of finite norms
    after = emu.attend(library, paged, copies=copies, raw_states=emu.raw_states, **paged.raw)
    assert torch.equal(before, after)


def test_one_missing_copy_is_read_from_its_code(library) -> None:
    paged = paged_of(codec_of("fibquant_1bit", 64), [70], [1])
    copies = make_copies(paged, 4, 32, torch.float16)
    whole = check(library, paged, copies=copies)
    copies[1][0, 10] = -1
    assert not torch.allclose(whole, check(library, paged, copies=copies), atol=1e-3)


def test_rows_outside_the_copies_are_not_followed(library) -> None:
    paged = paged_of(codec_of("fibquant_1bit", 64), [70], [1])
    copies = make_copies(paged, 4, 32, torch.float16)
    copies[1][0, 10] = -1
    expected = check(library, paged, copies=copies)
    copies[1][0, 10] = 2**30
    got = emu.attend(library, paged, copies=copies, raw_states=emu.raw_states, **paged.raw)
    assert torch.equal(got, expected)


def test_padded_requests_and_requests_without_tokens(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 30, 20], [1, 1, 1])
    copies, table = make_copies(paged, 4, 16, torch.float16)
    options = {"raw_states": emu.raw_states, **paged.raw}
    expected = emu.attend(library, paged, copies=(copies, table), **options)
    paged.query_start_loc = torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    paged.query = paged.query[[0, 2, 1, 1]]
    new = [x[[0, 2, 1, 1]] for x in (paged.new_key, paged.new_value)]
    options = {"raw_states": emu.raw_states, "raw_key": new[0], "raw_value": new[1]}
    paged.seq_lens = torch.tensor([40, 30, 20, 0], dtype=torch.int32)
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    table = torch.cat((table, torch.full_like(table[:1], -1)))
    got = emu.attend(library, paged, copies=(copies, table), **options)
    assert torch.equal(got[:2], expected[[0, 2]])
    assert got[2:].isnan().all()  # beyond query_start_loc: not written


def test_nan_query_spoils_only_its_own_row(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [60, 40], [1, 2])
    copies = make_copies(paged, 4, 32, torch.float16)
    options = {"copies": copies, "raw_states": emu.raw_states, **paged.raw}
    before = emu.attend(library, paged, **options)
    paged.query[1, 0, 5] = torch.nan
    after = emu.attend(library, paged, **options)
    assert after[1, 0].isnan().all()
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


def test_thread_order_does_not_matter(library) -> None:
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU chooses the order itself")
    paged = mapped_of("fibquant_3bit", 64, [200, 33], [1, 4], group_size=3)
    options = {"copies": make_copies(paged, 4, 70, torch.float16, 0.8)}
    options |= {"raw_states": emu.raw_states, **paged.raw}
    before = emu.attend(library, paged, **options)
    try:
        emu.options(library, reversed_order=True)
        assert torch.equal(emu.attend(library, paged, **options), before)
    finally:
        emu.options(library)


# ---- encode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_new_tokens_are_copied_as_they_are(library, dtype, head_dim: int, kind: str) -> None:
    codec = codec_of("fibquant_3bit", head_dim)
    key_map = None if kind == "plain" else map_of(codec, turning=True, num_first=3)
    device, served = emu.native_device(library), cuda.Cuda(library)
    generator = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 23, 2, head_dim, generator=generator).to(dtype)
    key[4, 1, 7], value[5, 0, 2] = torch.nan, torch.inf
    slots = torch.randperm(64, generator=generator)[:21]
    slots[6], slots[7] = -1, 64  # skipped; outside the cache
    rows = torch.full((22,), -1, dtype=torch.int32)
    rows[:20:2] = torch.randperm(30, generator=generator)[:10].int()
    rows[5], rows[7], rows[9], rows[11] = 30, 31, 32, 2**30  # the last two: no such row
    positions = torch.arange(21) % 9
    copies = Copies(*torch.full((2, 32, 2, head_dim), 7, dtype=dtype).to(device), 4)
    expected = Copies(*torch.full((2, 32, 2, head_dim), 7, dtype=dtype), 4)
    cache = torch.full((4, 2, 16, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
    pages = Pages(emu.aligned(cache).to(device), codec, key_map, served)
    on = [x.to(device) for x in (key, value, slots)]
    copied = Copied(copies, rows.to(device))
    served.encode_kv(*on, pages, positions.to(device), copied)
    inside = torch.where(slots < 64, slots, -1)
    known = Copied(expected, torch.where(rows < 32, rows, -1))
    oracle = Pages(cache, codec, key_map, ops.REFERENCE)
    reference.encode_kv(key, value, inside, oracle, positions, known)
    for got, wanted in zip(copies[:2], expected[:2], strict=True):
        assert torch.equal(got.cpu(), wanted)
    assert (copies.key[30] == 7).sum() == 0 and (copies.value[30, 0] == 0).all()
    assert (copies.key[31] == 7).all()  # its token was not stored


def test_records_are_the_same_with_copies(library) -> None:
    codec, device, served = codec_of("fibquant_2bit", 64), emu.native_device(library), None
    served = cuda.Cuda(library)
    key, value = torch.randn(2, 9, 2, 64).half().to(device)
    copies = Copies(*torch.zeros(2, 9, 2, 64, dtype=torch.float16).to(device), 0)
    caches = []
    for copied in (None, Copied(copies, torch.arange(9, dtype=torch.int32).to(device))):
        cache = torch.full((1, 2, 16, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
        pages = Pages(emu.aligned(cache).to(device), codec, None, served)
        served.encode_kv(key, value, torch.arange(9).to(device), pages, None, copied)
        caches.append(pages.cache)
    assert torch.equal(*caches) and torch.equal(copies.key, key)


# ---- refusals -----------------------------------------------------------------------------------


def test_what_the_kernels_do_not_have_is_refused(library) -> None:
    served = cuda.Cuda(library, raw_states=emu.raw_states)
    paged = paged_of(codec_of("fibquant_2bit", 64), [40], [1])
    pages = Pages(emu.aligned(paged.cache), paged.codec, None, served)
    copies, table = make_copies(paged, 4, 16, torch.float32)
    out = torch.empty_like(paged.query)

    def attend(*of_step):
        batch, attend, fresh = paged.split({"copies": of_step, **paged.raw})
        ops.paged_attention(paged.query, out, pages, batch, attend, fresh)

    with pytest.raises(ValueError, match="copies.key must be torch.bfloat16 or"):
        attend(copies, table)
    half = Copies(copies.key.half(), copies.value.half(), 4)
    new = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="new_rows must be None with the cuda kernels"):
        attend(half, table, new, new)
    rows = torch.zeros(1, dtype=torch.int32)
    where = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="copied must be None with the cpu"):
        ops.encode_kv(paged.key[:1], paged.value[:1], where, paged.pages, copied=Copied(half, rows))
    with pytest.raises(
        ValueError, match=r"copied.rows must be .*at least 1.* got torch.int32 \[0\]"
    ):
        ops.encode_kv(paged.key[:1], paged.value[:1], where, pages, copied=Copied(half, rows[:0]))


# ---- the start-up check --------------------------------------------------------------------------


def self_check(library, monkeypatch, **options) -> selfcheck.SelfCheckResult:
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU needs no stand-in")
    served = cuda.Cuda(library, raw_states=emu.raw_states)
    monkeypatch.setattr(ops, "choose", lambda codec, cache: served)
    return selfcheck.run_self_check(
        codec_of("fibquant_2bit", 64), torch.float16, 4, 2, 16, attends_raw=True, all_cases=True,
        has_copies=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_the_start_up_check_passes(library, monkeypatch, kind: str) -> None:
    key_map = None
    if kind == "all":
        key_map = map_of(codec_of("fibquant_2bit", 64), **KINDS["all"])
    result = self_check(library, monkeypatch, key_map=key_map)
    assert result.kernel == "cuda" and 0 < result.error <= result.tolerance


@pytest.mark.parametrize(
    ("function", "field", "message"),
    [
        ("fq_cuda_encode_kv", "copy_rows", "must copy tokens as they are"),
        ("fq_cuda_paged_attention", "copy_table", "must equal the oracle"),
    ],
)
def test_the_start_up_check_sees_copies(library, monkeypatch, function, field, message) -> None:
    called = getattr(library.lib, function)

    def without(codec, pages, key_map, args, stream) -> int:
        setattr(args._obj, field, None)
        return called(codec, pages, key_map, args, stream)

    monkeypatch.setattr(library.lib, function, without)
    with pytest.raises(RuntimeError, match=message):
        self_check(library, monkeypatch)
