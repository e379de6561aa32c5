# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against the oracle: on a GPU where the library runs, else in the emulator."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests import emulated as emu
from tests.paged import MAX_TIES, check_records, make_paged, use_reference
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops import Pages, cuda, gpu, kernels, reference, selfcheck, splits
from vllm_fibquant.ops.cuda_support import NARROW_COLUMNS, Support

PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]
OTHER_PAIR = {"key": {"subvec_dim": 8, "num_codewords": 256, "storage": "int8"}}


def codec_of(name: str, head_dim: int) -> KVCodec:
    return KVCodec.from_preset(PRESETS[name], head_dim)


def paged_of(*args, dtype=torch.float16, **options):
    with use_reference():  # needs no compiled CPU library
        return make_paged(*args, dtype=dtype, **options)


def check(library, paged, **options) -> None:
    """Error at most twice that of plain PyTorch in the model's dtype."""
    dtype = paged.query.dtype
    launch = {k: options.pop(k) for k in ("num_splits", "wide") if k in options}
    exact = paged.oracle(**options)
    plain = paged.oracle(dtype, **options).to(dtype)
    error = (emu.attend(library, paged, **launch, **options).double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2e-4
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset(library, name: str, group_size: int) -> None:
    paged = paged_of(codec_of(name, 64), [70, 1, 33], [1, 1, 2], group_size=group_size)
    check(library, paged)


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("name", ["fibquant_k5v3", "fibquant_1bit", "fibquant_k4v2"])
def test_every_head_dim(library, name: str, head_dim: int) -> None:
    paged = paged_of(codec_of(name, head_dim), [40, 23], [1, 3], num_kv_heads=1, group_size=3)
    check(library, paged)


@pytest.mark.parametrize("name", ["fibquant_k5v3", "fibquant_4bit", "fibquant_1bit"])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_wide_row_blocks(library, name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    check(library, paged_of(codec, [50, 9], [11, 9], group_size=3, num_kv_heads=1), wide=True)


def test_a_pair_of_codes_without_a_kernel_of_its_own(library) -> None:
    preset = PRESETS["fibquant_4bit"].with_overrides(OTHER_PAIR)
    codec = KVCodec.from_preset(preset, 64)
    assert ("k8n256", "k2n256") not in library.support.pairs
    for wide in (False, True):
        check(library, paged_of(codec, [50, 9], [1, 1], num_kv_heads=1), wide=wide)


OPTIONS = (
    {"window": 1},
    {"window": 20},
    {"soft_cap": 2.0},
    {"sinks": True},
    {"window": 20, "soft_cap": 5.0, "sinks": True},
    {"chunk": 21},
    {"chunk": 48, "soft_cap": 5.0, "sinks": True},
)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(library, options: dict, wide: bool) -> None:
    paged = paged_of(codec_of("fibquant_3bit", 64), [50, 101, 5], [9, 2, 5], group_size=3)
    check(library, paged, num_splits=3, wide=wide, **paged.given(options))


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("num_splits", [1, 5])
def test_lengths_around_a_block(library, block_size: int, num_splits: int) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 1, 200]
    paged = paged_of(
        codec_of("fibquant_2bit", 64), lens, [1] * 5, block_size=block_size, num_kv_heads=1
    )
    check(library, paged, num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_model_dtypes(library, dtype: torch.dtype) -> None:
    paged = paged_of(codec_of("fibquant_k5v3", 64), [90, 40], [1, 3], group_size=4, dtype=dtype)
    exact = paged.oracle()
    error = (emu.attend(library, paged).double() - exact).abs().max()
    # float32 queries are read as float16, relative to their largest coordinate.
    plain = paged.oracle(torch.bfloat16).bfloat16().double()
    assert error <= (plain - exact).abs().max() / (1 if dtype == torch.bfloat16 else 4)


def test_raw_states_take_the_place_of_new_tokens(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [50, 3], [3, 3], group_size=2)
    group, rows = 2, []
    for begin, end in ((0, 3), (3, 6)):
        q = paged.query[begin:end].double()
        k, v = (
            x[begin:end].double().repeat_interleave(group, 1)
            for x in (paged.new_key, paged.new_value)
        )
        scores = torch.einsum("qhd,shd->qhs", q, k) * paged.scale
        hidden = torch.ones(3, 3).triu(1).bool()
        scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
        m = scores.amax(-1)
        weights = (scores - m[..., None]).exp()
        rows.append((torch.einsum("qhs,shd->qhd", weights, v), m, weights.sum(-1)))
    o, m, l = (torch.cat(x).float().contiguous() for x in zip(*rows, strict=True))  # noqa: E741
    device = emu.native_device(library)
    states = tuple(x.to(device) for x in (o, m, l))
    got = emu.attend(library, paged, raw_states=states, **paged.raw)
    exact = paged.oracle(**paged.raw)
    assert (got.double() - exact).abs().max() < 2e-3
    # The second request has no tokens before its new ones: only raw states.
    expected = o[3:] / l[3:, :, None]
    torch.testing.assert_close(got[3:].float(), expected, rtol=2e-3, atol=2e-3)


def test_padded_requests_and_requests_without_tokens(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 30, 20], [1, 1, 1])
    expected = emu.attend(library, paged)
    # Request 1 has no new tokens; the last is padding of a CUDA graph, with one row and no token.
    paged.query_start_loc = torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)
    paged.query = paged.query[[0, 2, 1, 1]]
    paged.seq_lens = torch.cat((paged.seq_lens, torch.zeros(1, dtype=torch.int32)))
    paged.block_table = torch.cat((paged.block_table, paged.block_table[:1]))
    got = emu.attend(library, paged)
    assert torch.equal(got[:2], expected[[0, 2]])
    assert (got[2] == 0).all()
    assert got[3].isnan().all()  # beyond query_start_loc: not written


def test_every_stored_byte_matters_and_no_other(library) -> None:
    codec = codec_of("fibquant_2bit", 64)
    paged = paged_of(codec, [40], [1], num_kv_heads=1)
    paged.query = paged.query.float()
    before = emu.attend(library, paged)
    assert torch.equal(emu.attend(library, paged), before) and torch.isfinite(before).all()
    block, offset = divmod(int(paged.slots[17]), 16)
    for byte in range(codec.layout.record_bytes):
        old = int(paged.cache[block, 0, offset, byte])
        paged.cache[block, 0, offset, byte] = old ^ 0x15
        assert not torch.equal(emu.attend(library, paged), before), f"byte {byte}"
        paged.cache[block, 0, offset, byte] = old
    written = torch.zeros(paged.cache.shape[0] * 16, dtype=torch.bool)
    written[paged.slots] = True
    paged.cache.view(len(written), -1)[~written] = 0x7E  # another NaN
    assert torch.equal(emu.attend(library, paged), before)
    paged.block_table[0, [0, 2]] = paged.block_table[0, [2, 0]]
    assert not torch.equal(emu.attend(library, paged), before)


def test_blocks_before_the_window_are_not_read(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [100], [2], group_size=3)
    before = emu.attend(library, paged, window=30)
    paged.block_table[0, :4] = 2**30
    assert torch.equal(emu.attend(library, paged, window=30), before)


@pytest.mark.parametrize("bad", [-5, 2**30])
def test_a_block_outside_the_cache_gives_nan(library, bad: int) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [40, 40], [1, 1])
    before = emu.attend(library, paged)
    paged.block_table[0, 1] = bad
    after = emu.attend(library, paged)
    assert after[0].isnan().all() and torch.equal(after[1], before[1])


def test_nan_query_spoils_only_its_own_row(library) -> None:
    paged = paged_of(codec_of("fibquant_2bit", 64), [30, 40], [1, 2])
    before = emu.attend(library, paged)
    paged.query[1, 0, 5] = torch.nan
    after = emu.attend(library, paged)
    assert after[1, 0].isnan().all()
    after[1, 0] = before[1, 0]
    assert torch.equal(after, before)


@pytest.mark.parametrize("size", [1e-39, 1e-36], ids=["subnormal", "normal"])
def test_the_least_queries(library, size: float) -> None:
    """One over a subnormal number may be infinite: such a query counts as zeros."""
    paged = paged_of(codec_of("fibquant_2bit", 64), [40], [1], dtype=torch.float32)
    paged.query = torch.randn(paged.query.shape, generator=torch.Generator().manual_seed(4)) * size
    for wide in (False, True):
        got = emu.attend(library, paged, wide=wide)
        assert torch.isfinite(got).all()
        assert (got.double() - paged.oracle()).abs().max() < 2e-3


def test_extreme_norms(library) -> None:
    """Value norms from the least to the largest float16 in one sequence."""
    codec = codec_of("fibquant_2bit", 64)
    paged = paged_of(codec, [60], [1], num_kv_heads=1, dtype=torch.float32)
    at = codec.layout.value_norm_offset
    norms = torch.logspace(-7, 4.8, 60).half().view(torch.uint8).view(60, 2)
    for order in (slice(None), torch.arange(59, -1, -1)):
        paged.cache.view(-1, codec.layout.record_bytes)[paged.slots, at : at + 2] = norms[order]
        exact = paged.oracle()
        error = (emu.attend(library, paged).double() - exact).abs().max()
        assert error <= 2e-3 * exact.abs().max()


def test_thread_order_and_warps_do_not_matter(library) -> None:
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU chooses the order itself")
    paged = paged_of(codec_of("fibquant_k5v3", 64), [200, 33], [1, 4], group_size=3)
    before = {wide: emu.attend(library, paged, wide=wide) for wide in (False, True)}
    try:
        emu.options(library, reversed_order=True)
        for wide, expected in before.items():
            assert torch.equal(emu.attend(library, paged, wide=wide), expected)
        for sm, fill in ((79, (1, 4)), (87, (1, 6)), (144, (1, 16)), (188, (2, 8))):
            shared = ((sm - 1) << 10, sm << 10)
            emu.options(library, shared=shared)
            assert library.occupancy(64, 68, False, *shared)[:2] == fill
            got = emu.attend(library, paged)
            torch.testing.assert_close(got, before[False], rtol=2e-3, atol=2e-3)
    finally:
        emu.options(library)


# ---- encode -------------------------------------------------------------------------------------


def encode_both(library, codec, key, value, slots):
    """Caches after the kernel and after the oracle, and the kernel's counters."""
    device = emu.native_device(library)
    shape = (4, key.shape[1], 16, codec.layout.record_bytes)
    expected = torch.full(shape, 0xFF, dtype=torch.uint8)
    got = emu.aligned(expected).to(device)
    counters = kernels.device_counters(device).zero_()
    served = cuda.Cuda(library)
    on = (x.to(device) for x in (key, value, slots))
    served.encode_kv(*on, Pages(got, codec, None, served))
    inside = torch.where(slots < 64, slots, -1)
    oracle = Pages(expected, codec, None, ops.REFERENCE)
    assert int(counters[0]) == reference.encode_kv(key, value, inside, oracle)
    return got.cpu(), expected, counters.tolist()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [*((name, 64) for name in PRESET_NAMES)]
    + [(name, d) for name in ("fibquant_k5v3", "fibquant_1bit") for d in (96, 128, 192, 256)],
)
def test_records_equal_the_oracles(library, name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    key, value = torch.randn(2, 21, 2, head_dim, generator=torch.Generator().manual_seed(2)) * 3
    key[3, 1, 7] = float("nan")
    value[4, 0, 8] = -float("inf")
    key[5], value[6], key[7, 0, 1] = 0.0, 1e-41, 3e38
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:20]
    slots[9], slots[11] = -1, 64  # skipped; outside the cache
    got, expected, counters = encode_both(library, codec, key, value, slots)
    assert counters == [2, 2]
    check_records(codec, got, expected)


@pytest.mark.parametrize("gain", ["norm", "preserve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gain_rules_and_strided_half_inputs(library, gain: str, dtype: torch.dtype) -> None:
    preset = PRESETS["fibquant_3bit"].with_overrides(
        {"key": {"gain": gain}, "value": {"gain": gain}}
    )
    codec = KVCodec.from_preset(preset, 64)
    qkv = torch.randn(20, 8 * 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    key, value = qkv[:, 256:384].view(20, 2, 64), qkv[:, 384:].view(20, 2, 64)
    got, expected, _ = encode_both(library, codec, key, value, torch.arange(20) + 5)
    check_records(codec, got, expected)


# ---- what is supported --------------------------------------------------------------------------


def markdown(support: Support) -> str:
    """The table of docs/gpu.md."""
    lines = ["| code | coordinates | index bits | sign-folded |", "|---|---|---|---|"]
    for (dim, bits, folded), name in support.codes.items():
        lines.append(f"| `{name}` | {dim} | {bits} | {'yes' if folded else 'no'} |")
    lines += ["", "| head_dim | rows of a narrow row block | of a wide one |", "|---|---|---|"]
    for dim, columns in support.wide_columns.items():
        lines.append(f"| {dim} | {NARROW_COLUMNS} | {columns} |")
    pairs = ", ".join(f"`{key}`/`{value}`" for key, value in sorted(support.pairs))
    lines += ["", f"Key/value pairs with a decode kernel of their own: {pairs}."]
    return "\n".join(lines)


def test_the_documents_table_is_the_librarys(library) -> None:
    document = (emu.ROOT / "docs" / "gpu.md").read_text()
    assert markdown(library.support) in document, markdown(library.support)


def test_presets_have_a_kernel_of_their_own_and_others_are_refused(library) -> None:
    for name in PRESET_NAMES:
        preset = PRESETS[name]
        assert (preset.key.name, preset.value.name) in library.support.pairs, name
        for head_dim in library.support.wide_columns:
            assert library.support.unsupported(codec_of(name, head_dim)) is None
    assert "head_dim must be one of 64" in library.support.unsupported(
        codec_of("fibquant_2bit", 160)
    )
    codes = {key: name for key, name in library.support.codes.items() if name != "k8n256"}
    fewer = dataclasses.replace(library.support, codes=codes)
    assert "the key code must be one of k2n256" in fewer.unsupported(codec_of("fibquant_1bit", 64))
    cache = emu.aligned(torch.zeros(2, 1, 24, 36, dtype=torch.uint8))
    assert "block_size must be a multiple of 16" in cuda.unsupported_cache(cache)
    with pytest.raises(RuntimeError, match="pages must be 16-byte aligned"):
        paged = paged_of(codec_of("fibquant_2bit", 64), [5], [1], block_size=24)
        emu.attend(library, paged)


@pytest.fixture
def gpu_door(library, monkeypatch) -> None:
    """The ops' door leads CPU tensors to the emulated library, or to Triton."""
    if emu.native_device(library).type == "cuda":
        pytest.skip("a GPU needs no stand-in")
    monkeypatch.setattr(cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "kernels", lambda: cuda.Cuda(library))
    monkeypatch.setattr(gpu, "_why_not_on", lambda device: None)
    monkeypatch.setattr(ops, "choose", gpu.choose)


def test_the_door_chooses_the_library_where_it_fits(library, gpu_door, monkeypatch) -> None:
    codec = codec_of("fibquant_2bit", 64)
    paged = paged_of(codec, [40, 20], [1, 2])
    cache = paged.cache = emu.aligned(paged.cache)
    pages = ops.pages_of(cache, codec)
    assert pages.kernels.name == "cuda"
    assert gpu.choose(codec_of("fibquant_2bit", 160), cache).name == "triton"
    assert gpu.choose(codec, cache[:, :, :8]).name == "triton"
    assert (paged.attend().double() - paged.oracle()).abs().max() < 2e-3
    expected, slots = cache.clone(), torch.tensor([3, -1])
    assert ops.encode_kv(paged.new_key, paged.new_value, slots, pages) == 0
    oracle = Pages(expected, codec, None, ops.REFERENCE)
    reference.encode_kv(paged.new_key, paged.new_value, slots, oracle)
    assert float((cache != expected).any(-1).float().mean()) <= MAX_TIES


def test_why_the_library_is_not_taken(monkeypatch) -> None:
    codec, cache = codec_of("fibquant_2bit", 64), torch.zeros(1, 1, 16, 36, dtype=torch.uint8)
    monkeypatch.setattr(cuda, "is_built", lambda: False)
    assert "not built" in gpu.why_not_cuda(codec, cache)
    monkeypatch.setattr(cuda, "is_built", lambda: True)
    assert "cannot run on cpu: it is no GPU" in gpu.why_not_cuda(codec, cache)


# ---- the start-up check of a GPU -----------------------------------------------------------------


@pytest.fixture
def launches(library, gpu_door, monkeypatch) -> list[tuple[bool, int]]:
    """The attention calls that come through the door to a GPU of 132 multiprocessors, as (wide,
    number of splits)."""
    calls: list[tuple[bool, int]] = []

    def launch(codec, pages, key_map, args, stream) -> int:
        calls.append((bool(args._obj.wide), args._obj.num_splits))
        return real(codec, pages, key_map, args, stream)

    real = library.lib.fq_cuda_paged_attention
    monkeypatch.setattr(splits, "num_sms", lambda device: 132)
    monkeypatch.setattr(library.lib, "fq_cuda_paged_attention", launch)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_start_up_check_runs_what_a_gpu_serves(launches, dtype: torch.dtype) -> None:
    codec = codec_of("fibquant_k5v3", 64)
    result = selfcheck.run_self_check(codec, dtype, 8, 2, 16, all_cases=True)
    assert result.kernel == "cuda" and 0 < result.error <= result.tolerance
    kinds = {(wide, num_splits > 1) for wide, num_splits in launches}
    assert kinds == {(False, False), (False, True), (True, False)}
    assert len(launches) == 8


@pytest.mark.parametrize("broken", [(False, True), (True, False)], ids=["splits", "wide"])
def test_the_start_up_check_sees_each_kernel(library, launches, monkeypatch, broken) -> None:
    launch = library.lib.fq_cuda_paged_attention

    def no_values(codec, pages, key_map, args, stream) -> int:
        kind = bool(args._obj.wide), args._obj.num_splits > 1
        if kind == broken:
            args._obj.scale *= 1.2
        return launch(codec, pages, key_map, args, stream)

    monkeypatch.setattr(library.lib, "fq_cuda_paged_attention", no_values)
    with pytest.raises(RuntimeError, match="kernel cuda must equal the oracle"):
        selfcheck.run_self_check(codec_of("fibquant_2bit", 64), torch.float16, 4, 2, 16,
                                 all_cases=True)  # fmt: skip


def test_why_a_device_is_not_usable_is_the_runtimes_word(library, monkeypatch, caplog) -> None:
    def old() -> str:
        """What a library built by nvcc 13 says under an older driver."""
        return "CUDA driver version is insufficient for CUDA runtime version"

    codec, device = codec_of("fibquant_2bit", 64), torch.device("cuda", 0)
    pages = SimpleNamespace(
        device=device, is_cuda=True, shape=(1, 1, 16, 36), data_ptr=lambda: 0,
        stride=lambda axis: (576, 576, 36, 1)[axis],
    )  # fmt: skip
    monkeypatch.setattr(cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "kernels", lambda: cuda.Cuda(library))
    monkeypatch.setattr(library, "why_unusable", old)
    monkeypatch.setattr(cuda, "current", lambda device: contextlib.nullcontext())
    said: list[str] = []
    monkeypatch.setattr(gpu.logger, "warning", lambda text, *args: said.append(text % args))
    gpu._why_not_on.cache_clear()
    gpu._warn_of_triton.cache_clear()
    try:
        for _ in range(2):
            assert gpu.choose(codec, pages).name == "triton"
    finally:
        gpu._why_not_on.cache_clear()
    assert len(said) == 1 and "slower than --kv-cache-dtype auto" in said[0]
    assert "cannot run on cuda:0: CUDA driver version is insufficient" in said[0]
