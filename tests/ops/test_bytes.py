# SPDX-License-Identifier: Apache-2.0
"""The vectors of bytes of csrc/cpu/bytes.h: their instructions give the bits of their model."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.ops.test_lanes import ROOT, find_compiler

# Every function of the header, on vectors at `in` (2048 bytes): 64 bytes of `out` each.
SOURCE = """
#include "cpu/bytes.h"
using namespace fq::FQ_ISA;
extern "C" int run(const uint8_t* in, uint8_t* out) {
  const uint8_t* begin = out;
  const auto put = [&](vb x) { store_bytes(out, x); out += 64; };
  const auto put_bits = [&](uint64_t x) { memset(out, 0, 64); memcpy(out, &x, 8); out += 64; };
  const vb a = load_bytes(in), b = load_bytes(in + 64), c = load_bytes(in + 128);
  put((vb)splat_quad(in + 5));
  const uint8_t* const four[4] = {in + 1, in + 100, in + 222, in + 313};
  for (int count = 0; count <= 16; ++count) put(load_four(four, count));
  for (int count = 0; count <= 32; ++count) put(load_two(in + 3, in + 77, count));
  put(permute(a & splat_byte(63), b));
  put(permute(a & splat_byte(127), b, c));
  put(fields_at(a % splat_byte(57), b));
  for (int bit = 0; bit < 8; ++bit) put_bits(has_bits(a, (uint8_t)(1 << bit)));
  uint64_t mask;
  memcpy(&mask, in + 640, 8);
  put(complement(mask, a));
  put(look_up(load_table(in + 256), a, has_bits(a, 0x80)));
  put((vb)dot_bytes((vi)c, a, b));
  put((vb)dot_words((vi)c, (vi)a, (vi)b));
  put((vb)to_words((vi)a, (vi)b >> 13));
  put((vb)min_ints((vi)a, (vi)b));
  put((vb)max_ints((vi)a, (vi)b));
  for (int n = 0; n < 2; ++n) put((vb)halves_to_floats(a & splat_byte(0xBB), n));  // finite
  put((vb)load_quads(in + 9, (vi)a & 255));
  memset(out, 0, 64);
  store_low_bytes(out, (vi)a);
  out += 64;
  vf x;
  for (int i = 0; i < 16; ++i) x[i] = (float)((int)in[i] * 300 - (int)in[16 + i] * 200) / 7.0f;
  put((vb)to_ints(x));
  vi four_vectors[4] = {(vi)a, (vi)b, (vi)c, (vi)load_bytes(in + 192)};
  transpose_quads(four_vectors);
  for (const vi& v : four_vectors) put((vb)v);
  put((vb)even_parts((vi)a, (vi)b));
  put((vb)odd_parts((vi)a, (vi)b));
  for (int half = 0; half < 2; ++half) put(zip_bytes(half, a, b));
  for (int half = 0; half < 2; ++half) put(zip_words(half, a, b));
  put(absolute_bytes(a));
  return (int)(out - begin);
}
"""
INSTRUCTIONS = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mfma -mf16c -mbmi2"
)
OUTPUTS = 85


def build(folder: Path, name: str, *flags: str) -> ctypes.CDLL:
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(SOURCE)
    subprocess.run(
        [*find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-DFQ_ISA={name}",
         *flags, "-I", str(ROOT / "csrc"), str(source), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, data: np.ndarray) -> np.ndarray:
    out = np.full(128 * 64, 0x5A, np.uint8)
    pointers = (x.ctypes.data_as(ctypes.c_void_p) for x in (data, out))
    assert library.run(*pointers) == OUTPUTS * 64
    return out[: OUTPUTS * 64].reshape(OUTPUTS, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("model"), "model", "-DFQ_BYTE_MODEL", "-DFQ_LANES=16")


@pytest.mark.parametrize("isa", ["avx512-vnni"], indirect=True)
def test_instructions_give_the_bits_of_their_model(
    model: ctypes.CDLL, tmp_path: Path, isa: str
) -> None:
    instructions = build(tmp_path, "instructions", *INSTRUCTIONS.split())
    generator = np.random.default_rng(0)
    for trial in range(200):
        data = generator.integers(0, 256, 2048, np.uint8)
        if trial < 2:
            data[:] = 255 * trial  # extremes of products and shifts
        differ = (run(model, data) != run(instructions, data)).any(1).nonzero()[0]
        assert not len(differ), f"outputs {differ} of trial {trial}"


def test_the_model_does_what_the_header_says(model: ctypes.CDLL) -> None:
    """The functions that carry the most, against NumPy."""
    data = np.random.default_rng(1).integers(0, 256, 2048, np.uint8)
    out, (a, b, c) = run(model, data), data[:192].reshape(3, 64)
    table, products = data[256:512], a.astype(int) * b.view(np.int8)
    assert (out[51] == b[a % 64]).all()
    assert (out[52] == np.concatenate((b, c))[a % 128]).all()
    words = b.view("<u8").repeat(8)
    assert (out[53] == (words >> (a % 57).astype(np.uint64)).astype(np.uint8)).all()
    assert (out[63] == table[a]).all()
    sums = products.reshape(16, 4).sum(1) + c.view("<i4")
    assert (out[64].view("<i4") == sums.astype(np.int32)).all()
    for half in range(2):
        parts = [x.reshape(4, 2, 8)[:, half] for x in (a, b)]
        assert (out[80 + half] == np.stack(parts, -1).ravel()).all()
        words = [x.view("<u2") for x in parts]
        assert (out[82 + half].view("<u2") == np.stack(words, -1).ravel()).all()
    assert (out[84] == np.abs(a.view(np.int8).astype(int))).all()
