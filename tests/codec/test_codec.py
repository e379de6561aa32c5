# SPDX-License-Identifier: Apache-2.0
"""The oracle against its definitions: packing, search, gain rules, hostile input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_fibquant.codec.codebook import load_codebook
from vllm_fibquant.codec.codebook_build import BuildOptions, build_codebook
from vllm_fibquant.codec.codec import (
    MIN_COSINE,
    KVCodec,
    VectorCodec,
    nearest_rows,
    pack_indices,
    unpack_indices,
)
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS, CodeSpec
from vllm_fibquant.codec.rotation import make_rotation

PRESET_SPECS = sorted(
    {replace(s, gain="norm") for p in PRESETS.values() for s in (p.key, p.value)}, key=repr
)
GAINS = ("norm", "preserve", "mse", "unbiased")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost these small tensors more than they bring, and seconds on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_codec(spec: CodeSpec, head_dim: int = 64) -> VectorCodec:
    return VectorCodec(spec, head_dim, load_codebook(spec, head_dim), make_rotation(head_dim))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- packing -----------------------------------------------------------------------------------


@given(data=st.data(), bits=st.integers(1, 16), n=st.integers(1, 70))
@settings(deadline=None, max_examples=200)
def test_packing_is_a_string_of_bits(data, bits, n):
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=n, max_size=n))
    packed = pack_indices(torch.tensor(values, dtype=torch.int32), bits)
    # Naive: bit j of index i is bit i * bits + j of one long little-endian number.
    number = sum(value << (bits * i) for i, value in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes((n * bits + 7) // 8, "little")
    unpacked = unpack_indices(packed, n, bits)
    assert unpacked.dtype == torch.int32 and unpacked.tolist() == values


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_keeps_leading_axes(bits):
    rng = np.random.default_rng(bits)
    indices = torch.from_numpy(rng.integers(0, 1 << bits, (3, 2, 13))).int()
    packed = pack_indices(indices, bits)
    assert packed.shape == (3, 2, (13 * bits + 7) // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack_indices(packed, 13, bits), indices)
    assert torch.equal(packed[2, 1], pack_indices(indices[2, 1], bits))


def test_packing_refuses_bad_arguments():
    with pytest.raises(ValueError, match="index_bits must be from 1 to 16, got 17"):
        pack_indices(torch.zeros(2, dtype=torch.int32), 17)
    with pytest.raises(ValueError, match="must be 3 bytes for 2 indices of 12 bits, got 2"):
        unpack_indices(torch.zeros(2, dtype=torch.uint8), 2, 12)


# ---- search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_search_equals_the_definition(spec):
    """The nearest of all codewords, distances in float64; folded books are expanded."""
    codec = make_codec(spec)
    x = randn(40, 64)
    indices, _ = codec.encode(x)
    y = make_rotation(64).matrix.double() @ x.T.double() / x.double().norm(dim=1)
    subvecs = y.T.reshape(-1, spec.subvec_dim)
    distances = torch.cdist(
        subvecs, codec.codewords.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert codec.codewords.shape == (spec.num_codewords, spec.subvec_dim)
    best, taken = distances.min(1).values, distances.gather(1, indices.reshape(-1, 1).long())
    assert ((taken.squeeze(1) - best) <= 1e-6 * best).all()
    assert (distances.argmin(1) == indices.flatten()).float().mean() > 0.999


def test_ties_go_to_the_lowest_index():
    rows = torch.tensor([[0.0, 0.5], [0.5, 0.0], [0.5, 0.0], [0.0, 0.5]])
    subvecs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.0, 0.0]])
    assert nearest_rows(subvecs, rows).tolist() == [1, 0, 0, 0]
    assert nearest_rows(subvecs[:0], rows).shape == (0,)


def test_folded_index_is_pattern_above_magnitude():
    """An index takes the pattern apart: bit j negates coordinate j, magnitude in the low bits."""
    spec = CodeSpec(4, 4096, folded=True)
    codec = make_codec(spec)
    rows = codec.codebook.rows
    assert (rows > 0).all()
    # 16 subvectors of norm 1/4 make a unit vector, which encoding then leaves as it is.
    likely = (rows.norm(dim=1) - 0.25).abs().argsort().tolist()
    for pattern, row in zip((0b0000, 0b0001, 0b1000, 0b1010), likely, strict=False):
        signs = torch.tensor([-1.0 if pattern >> j & 1 else 1.0 for j in range(4)])
        index = pattern * 256 + row
        assert torch.equal(codec.codewords[index], signs * rows[row])
        y = codec.codewords[index].repeat(16)
        indices, norm = codec.encode(codec.rotation.inverse(y))
        assert indices.tolist() == [index] * 16
        torch.testing.assert_close(norm.float(), y.norm(), rtol=1e-3, atol=0)


def test_a_zero_coordinate_is_not_negative():
    codec = make_codec(CodeSpec(4, 4096, folded=True))
    y = torch.zeros(64)
    y[1] = -1.0
    assert codec._nearest(y)[0] >> 8 == 0b0010
    assert (codec._nearest(-0.0 * y.abs()) >> 8 == 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_error_is_the_codebooks(spec, head_dim):
    """Codec and codebook agree on the MSE: the whole path loses nothing beside the search."""
    codec = make_codec(spec, head_dim)
    x = randn(40000 // head_dim, head_dim)
    decoded = codec.decode(*codec.encode(x))
    mse = ((decoded - x).square().sum(1) / x.square().sum(1)).mean().item()
    assert mse == pytest.approx(codec.codebook.provenance["mse_rounded"], rel=0.04)


def test_large_batches_are_cut_without_a_seam():
    codec = make_codec(CodeSpec(8, 256))
    x = randn(5000, 64)
    indices, norms = codec.encode(x)
    for part in (x[:1], x[700:703], x[-1:]):
        row = int((x == part[0]).all(1).nonzero()[0])
        one, norm = codec.encode(part)
        assert torch.equal(one, indices[row : row + len(part)])
        assert torch.equal(norm, norms[row : row + len(part)])


# ---- gain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_gain_rules_do_what_their_names_say(spec, gain):
    x = 3 * randn(200, 64)
    codec = make_codec(replace(spec, gain=gain))
    decoded = codec.decode(*codec.encode(x)).double()
    x = x.double()
    length_sq, dot = x.square().sum(1), (x * decoded).sum(1)
    fp16 = 1e-3  # half a unit in the last place of a float16, twice over
    if gain == "norm":
        _, norms = codec.encode(x)
        torch.testing.assert_close(norms.double(), length_sq.sqrt(), rtol=fp16, atol=0)
    elif gain == "preserve":
        torch.testing.assert_close(decoded.norm(dim=1), length_sq.sqrt(), rtol=fp16, atol=0)
    elif gain == "mse":  # the error is orthogonal to what is decoded
        torch.testing.assert_close(dot, decoded.square().sum(1), rtol=fp16, atol=0)
    else:
        torch.testing.assert_close(dot, length_sq, rtol=fp16, atol=0)


@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_gain_rules_share_indices_and_mse_is_least(spec):
    x = randn(300, 64)
    indices, errors = [], {}
    for gain in GAINS:
        codec = make_codec(replace(spec, gain=gain))
        index, norms = codec.encode(x)
        indices.append(index)
        errors[gain] = (codec.decode(index, norms) - x).square().sum().item()
    assert all(torch.equal(index, indices[0]) for index in indices)
    assert min(errors, key=errors.get) == "mse" and len(set(errors.values())) == 4


# (MSE, <x, decoded> / |x|^2 - 1) per rule at head_dim 64; docs/method.md shows these.
GAIN_TABLE = {
    "k2n1024f": [(0.0019, -0.002), (0.0019, -0.001), (0.0019, -0.002), (0.0019, 0.0)],
    "k2n256": [(0.0075, -0.008), (0.0073, -0.004), (0.0073, -0.007), (0.0074, 0.0)],
    "k4n4096f": [(0.0257, -0.026), (0.0253, -0.013), (0.0251, -0.025), (0.0258, 0.0)],
    "k4n256": [(0.0947, -0.094), (0.0956, -0.048), (0.0933, -0.093), (0.1031, 0.0)],
    "k8n256": [(0.3168, -0.315), (0.3464, -0.173), (0.3161, -0.316), (0.4648, 0.0)],
}


@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_gain_table(spec):
    x = randn(4000, 64)
    length_sq = x.square().sum(1)
    for gain, (mse, bias) in zip(GAINS, GAIN_TABLE[spec.name], strict=True):
        codec = make_codec(replace(spec, gain=gain))
        decoded = codec.decode(*codec.encode(x))
        got_mse = ((decoded - x).square().sum(1) / length_sq).mean().item()
        got_bias = ((decoded * x).sum(1) / length_sq).mean().item() - 1
        print(f"\n| {spec.name} | {gain} | {got_mse:.4f} | {got_bias:+.3f} |", end="")
        assert got_mse == pytest.approx(mse, rel=0.02, abs=1e-4)
        assert got_bias == pytest.approx(bias, rel=0.02, abs=1e-3)


@pytest.fixture(scope="module")
def coarse_codec() -> dict[str, VectorCodec]:
    """A code so poor that <y, v> is below MIN_COSINE and sometimes negative."""
    spec = CodeSpec(32, 2, storage="float16")
    book, _ = build_codebook(spec, 64, BuildOptions(restarts=1, samples=4000, iterations=5))
    return {g: VectorCodec(replace(spec, gain=g), 64, book, make_rotation(64)) for g in GAINS}


def test_gain_is_guarded_where_the_code_is_poor(coarse_codec):
    x = randn(500, 64)
    _, unbiased = coarse_codec["unbiased"].encode(x)
    _, mse = coarse_codec["mse"].encode(x)
    bound = x.norm(dim=1) / MIN_COSINE
    assert (unbiased.float() <= bound * 1.001).all()
    assert (unbiased.float() >= bound * 0.999).any(), "the guard never came into play"
    assert (mse >= 0).all()
    # Here a gain of 0 meets lengths beyond float32.
    huge = coarse_codec["mse"].encode(3e38 * x.sign())[1]
    assert (huge == 0).any() and (huge == 65504).any() and torch.isfinite(huge).all()


# ---- hostile input -----------------------------------------------------------------------------


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("spec", PRESET_SPECS, ids=lambda s: s.name)
def test_hostile_vectors_decode_to_finite_numbers(spec, gain):
    codec = make_codec(replace(spec, gain=gain))
    x = randn(12, 64)
    x[0] = 0.0
    x[1, 5] = float("nan")
    x[2, 63] = float("inf")
    x[3, 0] = -float("inf")
    x[4] = 3e38
    x[5, 1:] = 0.0
    x[5, 0] = -3e38
    x[6] = 1e-40
    x[7] *= 1e-30
    x[8] *= 1e30
    x[9] *= 50000 / x[9].norm()
    alone, alone_norms = codec.encode(x[10:])
    indices, norms = codec.encode(x)
    assert (~x.isfinite().all(-1)).sum() == 3
    assert torch.equal(indices[10:], alone) and torch.equal(norms[10:], alone_norms)
    for row in (0, 1, 2, 3, 6):  # exact zeros
        assert norms[row] == 0 and (indices[row] == 0).all()
    assert norms[7] == 0
    saturated = norms[[4, 5, 8]]
    assert (saturated == 65504).all(), saturated
    assert norms[9] > 30000
    decoded = codec.decode(indices, norms)
    assert torch.isfinite(decoded).all()
    assert (decoded[[0, 1, 2, 3, 6, 7]] == 0).all()


@pytest.mark.parametrize("power", [-20, 0, 14, 60, 100])
def test_indices_do_not_depend_on_scale(power):
    codec = make_codec(CodeSpec(4, 256))
    x = randn(50, 64)
    assert torch.equal(codec.encode(x * 2.0**power)[0], codec.encode(x)[0])


def test_tiny_norms_are_float16_subnormals():
    codec = make_codec(CodeSpec(4, 256))
    x = randn(20, 64)
    x /= x.norm(dim=1, keepdim=True)
    _, norms = codec.encode(x * 2.0**-20)
    torch.testing.assert_close(norms.float(), torch.full((20,), 2.0**-20), rtol=2**-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_shape(dtype):
    codec = make_codec(CodeSpec(4, 256), 80)
    x = randn(2, 0, 3, 80).to(dtype)
    indices, norms = codec.encode(x)
    assert indices.shape == (2, 0, 3, 20) and norms.shape == (2, 0, 3)
    x = randn(2, 3, 160).to(dtype)[..., ::2]  # not contiguous
    indices, norms = codec.encode(x)
    assert indices.dtype == torch.int32 and norms.dtype == torch.float16
    assert torch.equal(indices, codec.encode(x.float().contiguous())[0])
    assert codec.decode(indices, norms).shape == (2, 3, 80)


# ---- keys and values together ------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_records_hold_both_codes(preset, head_dim):
    codec = KVCodec.from_preset(preset, head_dim)
    key, value = randn(3, 2, head_dim, seed=1), randn(3, 2, head_dim, seed=2)
    records = codec.encode_records(key, value)
    assert records.shape == (3, 2, codec.layout.record_bytes)
    for decoded, side, x in zip(
        codec.decode_records(records), (codec.key, codec.value), (key, value), strict=True
    ):
        assert torch.equal(decoded, side.decode(*side.encode(x)))
    for rotated, side, x in zip(
        codec.decode_records_rotated(records), (codec.key, codec.value), (key, value), strict=True
    ):
        assert torch.equal(rotated, side.decode_rotated(*side.encode(x)))
    assert torch.equal(records, codec.encode_records(key, value))


def test_codec_refuses_what_does_not_fit():
    spec = CodeSpec(4, 256)
    book = load_codebook(spec, 64)
    with pytest.raises(ValueError, match="must be for head_dim 128, got 64 and 128"):
        VectorCodec(spec, 128, book, make_rotation(128))
    with pytest.raises(ValueError, match="codebook must be of code k8n256 in int8, got k4n256"):
        VectorCodec(CodeSpec(8, 256), 64, book, make_rotation(64))
    with pytest.raises(ValueError, match="one head_dim, got 64 and 80"):
        KVCodec(make_codec(spec, 64), make_codec(spec, 80))
    with pytest.raises(ValueError, match="got 'fibquant_7bit'"):
        KVCodec.from_preset("fibquant_7bit", 64)
