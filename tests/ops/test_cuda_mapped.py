# SPDX-License-Identifier: Apache-2.0
"""Mapped keys by the CUDA kernels against the oracle: a calibration's means and transform, the part
of means that turns, first tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import emulated as emu
from tests.keys.test_key_map import make_map, make_turns
from tests.ops.test_cuda_emulated import OPTIONS, check, codec_of, paged_of
from vllm_fibquant import ops
from vllm_fibquant.keys.key_map import TurningMean
from vllm_fibquant.ops import Pages, cuda, cuda_tables, kernels, reference, selfcheck, splits

KINDS = {
    "means": {},
    "transform": {"transform": True},
    "turning": {"turning": True},
    "first": {"num_first": 3},
    "all": {"transform": True, "turning": True, "num_first": 4},
}


def map_of(codec, *, transform=False, turning=False, num_first=0, num_kv_heads=2):
    """As many pairs turn as a calibration lets: a quarter of them."""
    index_bytes, head_dim = transform * codec.layout.key_index_bytes, codec.head_dim
    key_map = make_map(head_dim, num_kv_heads, 1.0, index_bytes, num_first=num_first)
    if not turning:
        return key_map
    c = torch.randn(num_kv_heads, head_dim, generator=torch.Generator().manual_seed(8))
    turns = TurningMean.strongest(c, make_turns(head_dim), head_dim // 8 - 1)
    return dataclasses.replace(key_map, turning=turns)


def mapped_of(name: str, head_dim: int, *args, kind: str = "all", num_kv_heads: int = 2, **options):
    codec = codec_of(name, head_dim)
    key_map = map_of(codec, num_kv_heads=num_kv_heads, **KINDS[kind])
    return paged_of(codec, *args, num_kv_heads=num_kv_heads, key_map=key_map, **options)


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["fibquant_2bit", "fibquant_3bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_map(library, kind: str, name: str, wide: bool) -> None:
    paged = mapped_of(name, 64, [70, 3, 33], [1, 2, 5], kind=kind, group_size=3)
    check(library, paged, wide=wide)


@pytest.mark.parametrize("group_size", [1, 4, 8])
@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("fibquant_3bit", 64), ("fibquant_4bit", 64), ("fibquant_k4v2", 64), ("fibquant_1bit", 128)],
)
def test_groups_and_product_codes(library, name: str, head_dim: int, group_size: int) -> None:
    """Keys of 4 bits have subvectors of 2 alone; of keys of 1 bit half of the coordinates are
    coded."""
    check(library, mapped_of(name, head_dim, [70, 1, 33], [1, 1, 2], group_size=group_size))


@pytest.mark.parametrize("name", ["fibquant_3bit", "fibquant_k2v3"])
@pytest.mark.parametrize("head_dim", [96, 128, 192, 256])
def test_every_head_dim(library, name: str, head_dim: int) -> None:
    kind = "turning" if (head_dim, name) == (96, "fibquant_k2v3") else "all"
    for wide in (False, True):
        paged = mapped_of(name, head_dim, [40, 23], [1, 3], kind=kind, num_kv_heads=1, group_size=3)
        check(library, paged, wide=wide)


@pytest.mark.parametrize("name", ["fibquant_k5v3"])
def test_means_of_keys_too_precise_for_a_transform(library, name: str) -> None:
    check(library, mapped_of(name, 128, [90, 20], [1, 2], kind="turning", num_kv_heads=1))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", [{"window": 2}, *OPTIONS[1:]], ids=str)
def test_options(library, options: dict, wide: bool) -> None:
    paged = mapped_of("fibquant_3bit", 64, [50, 101, 5], [9, 2, 5], group_size=3)
    check(library, paged, num_splits=3, wide=wide, **paged.given(options))


@pytest.mark.parametrize("num_splits", [1, 5])
def test_lengths_around_first_tokens_and_blocks(library, num_splits: int) -> None:
    lens = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 200]
    paged = mapped_of("fibquant_3bit", 64, lens, [1] * len(lens), num_kv_heads=1)
    check(library, paged, num_splits=num_splits)


def test_bfloat16_models(library) -> None:
    paged = mapped_of("fibquant_3bit", 64, [90, 40], [1, 3], group_size=4, dtype=torch.bfloat16)
    check(library, paged)


@pytest.mark.parametrize("wide", [False, True])
def test_means_as_long_as_biases_of_keys(library, wide: bool) -> None:
    """A hundred times as long as what tells keys apart: no worse than twice plain float16."""
    codec = codec_of("fibquant_3bit", 64)
    key_map = map_of(codec, turning=True)
    mean = key_map.turning.mean * 100
    turning = dataclasses.replace(key_map.turning, mean=mean)
    key_map = dataclasses.replace(key_map, turning=turning, mean=key_map.mean * 100)
    paged = paged_of(codec, [90, 40], [1, 5], group_size=3, key_map=key_map)
    paged.query /= 8  # scores of some hundreds still
    check(library, paged, wide=wide)


def test_raw_new_tokens_beside_first_tokens(library) -> None:
    """Raw states are merged with those of the first tokens; new tokens' codes are not read."""
    paged = mapped_of("fibquant_3bit", 64, [50, 3, 6], [3, 3, 4], group_size=2)
    rows = []
    for begin, end in ((0, 3), (3, 6), (6, 10)):
        q = paged.query[begin:end].double()
        k, v = (
            x[begin:end].double().repeat_interleave(2, 1) for x in (paged.new_key, paged.new_value)
        )
        scores = torch.einsum("qhd,shd->qhs", q, k) * paged.scale
        hidden = torch.ones(end - begin, end - begin).triu(1).bool()
        scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
        m = scores.amax(-1)
        weights = (scores - m[..., None]).exp()
        rows.append((torch.einsum("qhs,shd->qhd", weights, v), m, weights.sum(-1)))
    o, m, l = (torch.cat(x).float().contiguous() for x in zip(*rows, strict=True))  # noqa: E741
    device = emu.native_device(library)
    states = tuple(x.to(device) for x in (o, m, l))
    for num_splits in (1, 2):
        got = emu.attend(library, paged, raw_states=states, num_splits=num_splits, **paged.raw)
        assert (got.double() - paged.oracle(**paged.raw)).abs().max() < 4e-3


def test_padded_requests_and_requests_without_tokens(library) -> None:
    paged = mapped_of("fibquant_3bit", 64, [40, 30, 20], [1, 1, 1])
    expected = emu.attend(library, paged)
    paged.query_start_loc = torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)
    paged.query = paged.query[[0, 2, 1, 1]]
    paged.seq_lens = torch.tensor([40, 30, 20, 0], dtype=torch.int32)
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    got = emu.attend(library, paged)
    assert torch.equal(got[:2], expected[[0, 2]])
    assert (got[2] == 0).all()
    assert got[3].isnan().all()  # beyond query_start_loc: not written


@pytest.mark.parametrize("token", [2, 17])
def test_every_stored_byte_matters_and_no_other(library, token: int) -> None:
    """Of a first token and of a later one."""
    paged = mapped_of("fibquant_2bit", 64, [40], [1], num_kv_heads=1)
    paged.query = paged.query.float() / 4
    before = emu.attend(library, paged)
    assert torch.equal(emu.attend(library, paged), before) and torch.isfinite(before).all()
    block, offset = divmod(int(paged.slots[token]), 16)
    for byte in range(paged.codec.layout.record_bytes):
        old = int(paged.cache[block, 0, offset, byte])
        paged.cache[block, 0, offset, byte] = old ^ 0x15
        assert not torch.equal(emu.attend(library, paged), before), f"byte {byte}"
        paged.cache[block, 0, offset, byte] = old
    written = torch.zeros(paged.cache.shape[0] * 16, dtype=torch.bool)
    written[paged.slots] = True
    paged.cache.view(len(written), -1)[~written] = 0x7E  # another NaN
    assert torch.equal(emu.attend(library, paged), before)


@pytest.mark.parametrize("entry", [0, 1])
def test_a_block_outside_the_cache_gives_nan(library, entry: int) -> None:
    paged = mapped_of("fibquant_3bit", 64, [40, 40], [1, 1])
    before = emu.attend(library, paged)
    paged.block_table[0, entry] = 2**30
    after = emu.attend(library, paged)
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


def test_nan_query_spoils_only_its_own_row(library) -> None:
    paged = mapped_of("fibquant_3bit", 64, [30, 40], [1, 2])
    before = emu.attend(library, paged)
    paged.query[1, 0, 5] = torch.nan
    after = emu.attend(library, paged)
    assert after[1, 0].isnan().all()
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


def test_thread_order_does_not_matter(library) -> None:
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU chooses the order itself")
    paged = mapped_of("fibquant_3bit", 64, [200, 33], [1, 4], group_size=3)
    before = {wide: emu.attend(library, paged, wide=wide) for wide in (False, True)}
    try:
        emu.options(library, reversed_order=True)
        for wide, expected in before.items():
            assert torch.equal(emu.attend(library, paged, wide=wide), expected)
    finally:
        emu.options(library)


# ---- encode -------------------------------------------------------------------------------------


def encode_both(library, codec, key_map, key, value, slots, positions):
    """Caches after the kernel and after the oracle, and the kernel's counters."""
    device = emu.native_device(library)
    shape = (4, key.shape[1], 16, codec.layout.record_bytes)
    expected = torch.full(shape, 0xFF, dtype=torch.uint8)
    got = emu.aligned(expected).to(device)
    counters = kernels.device_counters(device).zero_()
    served = cuda.Cuda(library)
    on = [x.to(device) for x in (key, value, slots)]
    served.encode_kv(*on, Pages(got, codec, key_map, served), positions.to(device))
    inside = torch.where(slots < 64, slots, -1)
    oracle = Pages(expected, codec, key_map, ops.REFERENCE)
    assert int(counters[0]) == reference.encode_kv(key, value, inside, oracle, positions)
    return got.cpu(), expected, counters.tolist()


@pytest.mark.parametrize(
    ("name", "head_dim", "kind"),
    [("fibquant_3bit", 64, kind) for kind in KINDS]
    + [("fibquant_2bit", d, "all") for d in (64, 128, 192, 256)]
    + [
        ("fibquant_3bit", 96, "all"),
        ("fibquant_k5v3", 96, "turning"),
        ("fibquant_1bit", 128, "all"),
    ]
    + [("fibquant_4bit", 64, "all")],
)
def test_records_equal_the_oracles(library, name: str, head_dim: int, kind: str) -> None:
    codec = codec_of(name, head_dim)
    key_map = map_of(codec, **KINDS[kind])
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 41, 2, head_dim, generator=generator) * 3
    positions = torch.arange(41) % 21 * 7
    key = key + key_map.mean_at(positions, torch.float32)
    key[3, 1, 7] = float("nan")
    value[4, 0, 8] = -float("inf")
    value[6] = 1e-41
    key[7] = key_map.mean_at(positions[7:8], torch.float32)[0]  # nothing is left
    slots = torch.randperm(64, generator=generator)[:40]
    slots[9], slots[11] = -1, 64  # skipped; outside the cache
    got, expected, counters = encode_both(library, codec, key_map, key, value, slots, positions)
    assert counters == [2, 2]
    different = (got != expected).any(-1)
    assert float(different.float().mean()) <= 0.02
    stands = torch.zeros(64, dtype=torch.long)
    stands[slots[:9]] = positions[:9]
    for a, b in zip(
        key_map.decode_records(got[different][:, None].expand(-1, 2, -1), codec, torch.float32,
                               torch.full((int(different.sum()),), 5)),
        key_map.decode_records(expected[different][:, None].expand(-1, 2, -1), codec, torch.float32,
                               torch.full((int(different.sum()),), 5)),
        strict=True,
    ):  # fmt: skip
        assert ((a.norm(dim=-1) / b.norm(dim=-1)) - 1).abs().le(2e-2).all()


def test_positions_outside_the_tables_are_counted_and_not_stored(library) -> None:
    codec = codec_of("fibquant_3bit", 64)
    key_map = map_of(codec, **KINDS["all"])
    key, value = torch.randn(2, 3, 2, 64)
    device = emu.native_device(library)
    cache = torch.full((1, 2, 16, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
    cache = emu.aligned(cache).to(device)
    counters, served = kernels.device_counters(device).zero_(), cuda.Cuda(library)
    positions = torch.tensor([-1, 5, key_map.turning.turns.num_positions + 64])
    on = [x.to(device) for x in (key, value, torch.arange(3))]
    served.encode_kv(*on, Pages(cache, codec, key_map, served), positions.to(device))
    assert counters.tolist() == [0, 4]
    assert (cache[0, :, [0, 2]] == 0xFF).all() and not (cache[0, :, 1] == 0xFF).all(-1).any()


# ---- the start-up check --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["means", "all"])
def test_the_start_up_check_passes(library, monkeypatch, kind: str, dtype: torch.dtype) -> None:
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU needs no stand-in")
    codec, kernels = codec_of("fibquant_3bit", 64), cuda.Cuda(library)
    monkeypatch.setattr(splits, "num_sms", lambda device: 132)
    monkeypatch.setattr(ops, "choose", lambda codec, cache: kernels)
    key_map = make_map(64)  # long means
    if kind == "all":
        key_map = map_of(codec, **KINDS[kind])
    result = selfcheck.run_self_check(codec, dtype, 8, 2, 16, key_map=key_map, all_cases=True)
    assert result.kernel == "cuda" and 0 < result.error <= result.tolerance


# ---- what is supported --------------------------------------------------------------------------


def test_maps_without_a_kernel_are_refused(library) -> None:
    codec = codec_of("fibquant_2bit", 96)
    key_map = map_of(codec, transform=True)
    assert "got 24, 24, 48 in 24 bytes" in cuda_tables.unsupported_key_map(key_map)
    served = cuda.Cuda(library)
    cache = emu.aligned(torch.zeros(2, 2, 16, codec.layout.record_bytes, dtype=torch.uint8))
    with pytest.raises(ValueError, match='pages_of: transformed keys of head_dim 96.*"means"'):
        Pages(cache, codec, key_map, served)
    many = make_map(64, turning=True)  # 9 fast pairs and 8 slow ones
    assert "at most 16 pairs of coordinates" in cuda_tables.unsupported_key_map(many)
    struct = cuda_tables.key_map_struct(key_map, torch.device("cpu"))
    layer = served_layer(served, cache, codec)
    from ctypes import byref

    error = library.lib.fq_cuda_encode_kv(
        *layer, byref(struct), byref(cuda.FqCudaEncode(num_tokens=1)), None
    )
    assert library.lib.fq_cuda_error(error) == b"no kernel for this map of keys"


def served_layer(served, cache, codec):
    layer = cuda._Layer(served.library, Pages(cache, codec, None, served))
    return layer.codec, layer.pages
