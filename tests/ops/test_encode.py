# SPDX-License-Identifier: Apache-2.0
"""Encode-and-store against the oracle; the library's page layout against Python's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.paged import record_layout
from vllm_fibquant import ops
from vllm_fibquant.codec.codebook import make_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec, unpack_indices
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, CodeSpec
from vllm_fibquant.codec.rotation import make_rotation
from vllm_fibquant.ops import Pages, cpu, cpu_library
from vllm_fibquant.ops.selfcheck import run_self_check

PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]
MAX_TIES = 0.01


def encode_both(codec: KVCodec, key: torch.Tensor, value: torch.Tensor):
    """(kernel's cache, oracle's cache, kernel's count, oracle's count), tokens in reverse slots."""
    num_tokens, num_kv_heads = key.shape[:2]
    shape = (-(-num_tokens // 8) + 1, num_kv_heads, 8, codec.layout.record_bytes)
    caches = [torch.full(shape, 0xFF, dtype=torch.uint8) for _ in range(2)]
    slots = torch.arange(num_tokens).flip(0) + 3
    counts = [
        kernels.encode_kv(key, value, slots, Pages(cache, codec, None, kernels))
        for kernels, cache in zip((ops.CPU, ops.REFERENCE), caches, strict=True)
    ]
    return *caches, *counts


def check_records(codec: KVCodec, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Records are equal but for ties of the two nearest codewords, which are counted and capped."""
    different = (got != expected).any(-1)
    share = float(different.float().mean())
    assert share <= MAX_TIES, f"{share:.2%} of records differ"
    if not different.any():
        return
    decoded = [codec.decode_records_rotated(c[different]) for c in (got, expected)]
    for a, b in zip(*decoded, strict=True):
        # Whichever codeword was taken, the vector is as long and as far from the truth.
        ratio = a.norm(dim=-1) / b.norm(dim=-1)
        assert (ratio - 1).abs().max() < 1e-2


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_layout_is_the_librarys(name: str, head_dim: int) -> None:
    codec = KVCodec.from_preset(PRESETS[name], head_dim)
    layout = codec.layout
    assert record_layout(codec) == [
        layout.key_index_offset,
        layout.value_index_offset,
        layout.key_norm_offset,
        layout.value_norm_offset,
        layout.record_bytes,
    ]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_records_equal_the_oracles(name: str, head_dim: int) -> None:
    codec = KVCodec.from_preset(PRESETS[name], head_dim)
    generator = torch.Generator().manual_seed(head_dim)
    key, value = torch.randn(2, 150, 2, head_dim, generator=generator) * 3
    got, expected, *counts = encode_both(codec, key, value)
    check_records(codec, got, expected)
    assert counts == [0, 0]


@pytest.mark.parametrize("gain", ["norm", "preserve", "mse", "unbiased"])
@pytest.mark.parametrize("name", ["fibquant_4bit", "fibquant_3bit", "fibquant_1bit"])
def test_every_gain_rule(name: str, gain: str) -> None:
    preset = PRESETS[name].with_overrides({"key": {"gain": gain}, "value": {"gain": gain}})
    codec = KVCodec.from_preset(preset, 64)
    key, value = torch.randn(2, 100, 2, 64, generator=torch.Generator().manual_seed(1))
    got, expected, *_ = encode_both(codec, key, value)
    check_records(codec, got, expected)
    decoded, _ = codec.decode_records(got[1])
    assert decoded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes_and_strided_inputs(dtype: torch.dtype) -> None:
    """Keys and values are slices of one fused projection, as vLLM hands them over."""
    codec = KVCodec.from_preset(PRESETS["fibquant_3bit"], 64)
    qkv = torch.randn(60, 8 * 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    key = qkv[:, 4 * 64 : 6 * 64].view(60, 2, 64)
    value = qkv[:, 6 * 64 :].view(60, 2, 64)
    assert not key.is_contiguous()
    got, expected, *_ = encode_both(codec, key, value)
    check_records(codec, got, expected)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512-vnni"])
@pytest.mark.parametrize(
    "name", ["fibquant_k5v3", "fibquant_4bit", "fibquant_2bit", "fibquant_1bit"]
)
def test_every_instruction_set(isa: str, name: str) -> None:
    try:
        cpu_library.select_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU does not have {isa}")
    try:
        for head_dim in (64, 80):
            codec = KVCodec.from_preset(PRESETS[name], head_dim)
            key, value = torch.randn(2, 60, 2, head_dim, generator=torch.Generator().manual_seed(3))
            got, expected, *_ = encode_both(codec, key, value)
            check_records(codec, got, expected)
    finally:
        cpu_library.select_isa(None)


@pytest.mark.parametrize(
    "code",
    [CodeSpec(2, 64), CodeSpec(4, 256), CodeSpec(8, 64), CodeSpec(16, 32)],
    ids=lambda c: c.name,
)
def test_ties_go_to_the_lowest_index(code: CodeSpec) -> None:
    """In a codebook whose rows all occur twice or more, the first of them is stored."""
    first = np.random.default_rng(0).integers(-127, 128, (code.num_rows // 4, code.subvec_dim))
    order = np.random.default_rng(1).permutation(np.tile(np.arange(len(first)), 4))
    book, _ = make_codebook(code, 64, first[order], 1 / 512, {})
    side = VectorCodec(code, 64, book, make_rotation(64))
    codec = KVCodec(side, side)
    key, value = torch.randn(2, 40, 2, 64, generator=torch.Generator().manual_seed(5))
    got, expected, *_ = encode_both(codec, key, value)
    assert torch.equal(got, expected)
    packed = got[1:-1, ..., : code.index_bytes(64)]
    stored = unpack_indices(packed, side.num_subvecs, code.index_bits).unique().tolist()
    lowest = {int(np.flatnonzero(order == row)[0]) for row in range(len(first))}
    assert len(stored) > 4 and set(stored) <= lowest


SPECIAL = {
    "zero": 0.0,
    "denormal": 1e-41,
    "tiny": 1e-30,
    "huge": 3e38,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": float("-inf"),
}


@pytest.mark.parametrize("name", ["fibquant_4bit", "fibquant_3bit"])
@pytest.mark.parametrize("where", ["one coordinate", "whole vector"])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_values(special: str, where: str, name: str) -> None:
    codec = KVCodec.from_preset(PRESETS[name], 64)
    key, value = torch.randn(2, 20, 2, 64, generator=torch.Generator().manual_seed(4))
    if where == "one coordinate":
        key[3, 1, 7] = value[11, 0, 60] = SPECIAL[special]
    else:
        key[3, 1] = value[11, 0] = SPECIAL[special]
    got, expected, count, expected_count = encode_both(codec, key, value)
    assert torch.equal(got, expected)
    assert count == expected_count == (2 if special in ("nan", "inf", "minus_inf") else 0)
    records = got.transpose(1, 2).reshape(-1, 2, got.shape[-1])[torch.arange(20).flip(0) + 3]
    keys, values = codec.decode_records(records)
    assert keys.isfinite().all() and values.isfinite().all()
    if special in ("nan", "inf", "minus_inf") or (special == "zero" and where == "whole vector"):
        assert (keys[3, 1] == 0).all() and (values[11, 0] == 0).all()
    if special == "huge":
        assert 1e4 < keys[3, 1].norm() <= 65504 * 1.5
    assert (keys[4] != 0).any()  # neighbours are untouched


def test_skipped_tokens_write_nothing() -> None:
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    cache = torch.full((2, 2, 8, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
    key = torch.randn(6, 2, 64)
    slots = torch.tensor([-1, 9, -1, 0])  # fewer slots than tokens: the rest is padding
    ops.encode_kv(key, key, slots, ops.pages_of(cache, codec))
    written = (cache != 0xFF).any(-1).all(1).flatten()
    assert written.nonzero().flatten().tolist() == [0, 9]


@pytest.mark.parametrize("slot", [16, 10**9])
def test_slot_outside_the_cache_is_refused(slot: int) -> None:
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    cache = torch.zeros(2, 2, 8, codec.layout.record_bytes, dtype=torch.uint8)
    key = torch.randn(1, 2, 64)
    with pytest.raises(ValueError, match="slots below 16"):
        ops.encode_kv(key, key, torch.tensor([slot]), ops.pages_of(cache, codec))


@pytest.mark.parametrize(
    ("key", "value", "slots", "message"),
    [
        (torch.zeros(2, 3, 64), torch.zeros(2, 2, 64), torch.zeros(2).long(), "key must be"),
        (torch.zeros(2, 2, 64), torch.zeros(3, 2, 64), torch.zeros(2).long(), "value must be"),
        (torch.zeros(2, 2, 64), torch.zeros(2, 2, 64), torch.zeros(3).long(), "at most"),
        (torch.zeros(2, 2, 64), torch.zeros(2, 2, 64), torch.zeros(2).int(), "torch.int64"),
    ],
)
def test_bad_arguments_are_refused(key, value, slots, message: str) -> None:
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    cache = torch.zeros(2, 2, 8, codec.layout.record_bytes, dtype=torch.uint8)
    pages = ops.pages_of(cache, codec)
    with pytest.raises(ValueError, match=message):
        ops.encode_kv(key, value, slots, pages)
    good = torch.zeros(2, 2, 64), torch.zeros(2, 2, 64), torch.zeros(2).long()
    for _ in range(2):  # what passed is remembered
        ops.encode_kv(*good, pages)
        with pytest.raises(ValueError, match=message):
            ops.encode_kv(key, value, slots, pages)


# ---- the self-check -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("preset", "head_dim"),
    [("fibquant_3bit", 64), ("fibquant_2bit", 256), ("fibquant_4bit", 128), ("fibquant_1bit", 80)],
)
def test_self_check_passes(preset: str, head_dim: int, dtype: torch.dtype) -> None:
    codec = KVCodec.from_preset(PRESETS[preset], head_dim)
    result = run_self_check(codec, dtype, num_q_heads=9, num_kv_heads=3, block_size=16)
    assert 0 < result.error <= result.tolerance


@pytest.mark.parametrize("damage", ["codebook", "output", "record"])
def test_self_check_refuses_a_damaged_kernel(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = KVCodec.from_preset(PRESETS["fibquant_2bit"], 64)
    attend, encode = ops.CPU.paged_attention, ops.CPU.encode_kv

    def damaged_attend(query, out, *args):
        attend(query, out, *args)
        if damage == "output":
            out[-1, 0] *= 1.1

    def damaged_encode(key, value, slots, pages, *args):
        count = encode(key, value, slots, pages, *args)
        if damage == "record":
            pages.cache[..., 0] ^= 1
        return count

    monkeypatch.setattr(ops.CPU, "paged_attention", damaged_attend)
    monkeypatch.setattr(ops.CPU, "encode_kv", damaged_encode)
    if damage == "codebook":
        other = KVCodec.from_preset(
            PRESETS["fibquant_2bit"].with_overrides({"rotation_seed": 1}), 64
        )
        struct = cpu.codec_struct(other)
        monkeypatch.setattr(cpu, "codec_struct", lambda _: struct)
    with pytest.raises(RuntimeError, match="refusing to serve"):
        run_self_check(codec, torch.float32, 9, 3, 16)
