# SPDX-License-Identifier: Apache-2.0
"""Norms of one byte: the grid, the record, and the kernels against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.test_attention import check_against_oracle
from tests.paged import make_paged
from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.codec.config import PRESETS, CodeSpec
from vllm_fibquant.codec.gain import LOWEST, level_of_half, levels, pack_norms, unpack_norms
from vllm_fibquant.keys.transform import transform_problem
from vllm_fibquant.ops import Pages, cpu
from vllm_fibquant.options import parse_options

PRESET_NAMES = [name for name in PRESETS if name != "fibquant"]
BITS = [(8, 8), (8, 16), (16, 8)]


def codec_of(name: str, head_dim: int = 64, bits: tuple[int, int] = (8, 8)) -> KVCodec:
    given = {"key": {"gain_bits": bits[0]}, "value": {"gain_bits": bits[1]}}
    return KVCodec.from_preset(PRESETS[name].with_overrides(given), head_dim)


def test_the_grid() -> None:
    grid = levels().double()
    assert grid[0] == 0 and grid[1] == LOWEST and grid[-1] < 65504
    ratio = grid[2:] / grid[1:-1]
    assert (ratio - 2 ** (1 / 16)).abs().max() < 2e-3  # levels are rounded to float16
    assert torch.equal(unpack_norms(pack_norms(levels().half(), 1)), levels().half())


def test_every_norm_becomes_the_nearest_level() -> None:
    norms = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)  # all that are finite
    stored = unpack_norms(pack_norms(norms, 1)).double()
    distance = (norms.double().unsqueeze(-1) - levels().double()).abs()
    assert torch.equal((norms.double() - stored).abs(), distance.amin(-1))
    assert torch.equal(pack_norms(norms, 1).squeeze(-1), level_of_half()[: len(norms)])
    inside = (norms >= LOWEST) & (norms <= levels()[-1])
    error = (stored / norms.double() - 1)[inside]
    assert error.abs().max() < 0.0225
    assert error.square().mean() == pytest.approx(1.56e-4, rel=0.1)
    assert stored[norms < LOWEST / 2].max() == 0
    assert stored[norms > levels()[-1]].min() == stored.max() == levels()[-1]


@pytest.mark.parametrize("bits", [*BITS, (16, 16)])
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_the_record(name: str, bits: tuple[int, int]) -> None:
    codec, plain = codec_of(name, 80, bits), KVCodec.from_preset(PRESETS[name], 80)
    at = codec.layout
    assert cpu.record_layout(codec) == [
        0, at.key_index_bytes, at.key_norm_offset, at.value_norm_offset, at.record_bytes,
    ]  # fmt: skip
    assert at.record_bytes == plain.layout.record_bytes - (32 - sum(bits)) // 8


def test_what_is_read_behind_the_indices_is_inside_the_record() -> None:
    preset = replace(PRESETS["fibquant_2bit"], value=PRESETS["fibquant_k5v3"].key)
    for bits in BITS[1:]:
        given = {"key": {"gain_bits": bits[0]}, "value": {"gain_bits": bits[1]}}
        assert KVCodec.from_preset(preset.with_overrides(given), 64).layout.record_bytes == 59
    both = {"key": {"gain_bits": 8}, "value": {"gain_bits": 8}}
    with pytest.raises(ValueError, match="gain_bits must be 16 for keys or values when values"):
        KVCodec.from_preset(preset.with_overrides(both), 64)


def test_what_it_costs() -> None:
    """The mean square of a level's error is added to the code's, and nothing else."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for gain_bits in (16, 8):
        spec = replace(PRESETS["fibquant_2bit"].key, gain_bits=gain_bits)
        codec = VectorCodec.from_spec(spec, 64)
        decoded = codec.decode(*codec.encode(x))
        errors[gain_bits] = float((decoded - x).square().sum() / x.square().sum())
    assert errors[8] - errors[16] == pytest.approx(1.56e-4, rel=0.25)
    assert errors[8] < 1.003 * errors[16]


@pytest.mark.parametrize("name", ["fibquant_4bit", "fibquant_k5v3", "fibquant_1bit"])
def test_odd_vectors(name: str, isa: str) -> None:
    """Zero, too small, too large, NaN and infinity: the kernel's records are the oracle's."""
    codec = codec_of(name)
    unit = torch.nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator()), dim=-1)
    x = torch.cat([unit * size for size in (0, 1e-30, 0.001, 0.02, 1.0, 1e4, 1e30)])
    x = torch.cat((x, x[4:5], x[4:5])).unsqueeze(1)
    x[-2, 0, 3], x[-1, 0, 5] = torch.nan, torch.inf
    got, expected = torch.full((2, 1, 1, 16, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
    counts = [kernels.encode_kv(x, x, torch.arange(len(x)), Pages(cache, codec, None, kernels))
              for kernels, cache in ((ops.CPU, got), (ops.REFERENCE, expected))]  # fmt: skip
    assert counts == [4, 4]
    assert torch.equal(got, expected)
    norms = [d.norm(dim=-1) for d in codec.decode_records(got[0, 0, : len(x)])]
    top = float(levels()[-1])
    for found, side in zip(norms, (codec.key, codec.value), strict=True):
        assert (found[[0, 1, 2, 7, 8]] == 0).all()
        assert 0 < found[3] < 0.1 and 0.5 < found[4] < 2
        direction = side.decode(side.encode(unit)[0], torch.ones(1, dtype=torch.float16)).norm()
        assert found[5:7].tolist() == pytest.approx([top * float(direction)] * 2, rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_kernel_records_equal_the_oracles(name: str, bits: tuple[int, int], isa: str) -> None:
    codec = codec_of(name, 80, bits)
    key, value = torch.randn(2, 200, 2, 80, generator=torch.Generator().manual_seed(1)) * 3
    got, expected = torch.full((2, 13, 2, 16, codec.layout.record_bytes), 0xFF, dtype=torch.uint8)
    for kernels, cache in ((ops.CPU, got), (ops.REFERENCE, expected)):
        kernels.encode_kv(key, value, torch.arange(200), Pages(cache, codec, None, kernels))
    different = (got != expected).any(-1)
    assert float(different.float().mean()) <= 0.02
    # A norm on the border of two levels may fall to either.
    for a, b in zip(*(codec.decode_records_rotated(c[different]) for c in (got, expected)),
                    strict=True):  # fmt: skip
        assert ((a.norm(dim=-1) / b.norm(dim=-1)) - 1).abs().le(0.055).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_kernel_attention_equals_the_oracles(name: str, bits: tuple[int, int], isa: str) -> None:
    paged = make_paged(codec_of(name, 64, bits), [70, 1, 33], [1, 1, 4], group_size=3)
    check_against_oracle(paged)
    check_against_oracle(paged, window=20, **paged.raw)


def test_a_flipped_level_changes_the_output() -> None:
    paged = make_paged(codec_of("fibquant_3bit"), [40], [1])
    before = paged.attend()
    at = paged.codec.layout
    for offset in (at.key_norm_offset, at.value_norm_offset):
        block, slot = paged.block_table[0, 1], 3
        paged.cache[block, 0, slot, offset] ^= 8
        assert not torch.equal(paged.attend(), before)
        paged.cache[block, 0, slot, offset] ^= 8
    assert torch.equal(paged.attend(), before)


def test_what_is_refused() -> None:
    assert "gain_bits must be 16 on a GPU" in str(
        ops.unsupported_codec(codec_of("fibquant_2bit"), "cuda")
    )
    problem = transform_problem(codec_of("fibquant_2bit").key.spec, 64)
    assert "keys must have gain_bits 16 to be transformed, got 8" in str(problem)
    with pytest.raises(ValueError, match="gain_bits must be 8 or 16, got 12"):
        CodeSpec(4, 256, gain_bits=12)
    with pytest.raises(ValueError, match="gain_bits must be 8 or 16, got '8'"):
        parse_options("fibquant", {"fibquant": {"key": {"gain_bits": "8"}}})


def test_options() -> None:
    options = parse_options("fibquant_2bit", {"fibquant": {"value": {"gain_bits": 8}}})
    assert (options.preset.key.gain_bits, options.preset.value.gain_bits) == (16, 8)
    assert options.digest != parse_options("fibquant_2bit").digest
