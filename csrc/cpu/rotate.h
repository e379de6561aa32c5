// SPDX-License-Identifier: Apache-2.0
// Rotations: Walsh-Hadamard transforms and products with matrices.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

constexpr int kMaxHeadDim = 512;

template <int kHalf>
static inline vf butterfly(vf x) {
  vi swap;
  vf sign;
  for (int i = 0; i < kLanes; ++i) {
    swap[i] = i ^ kHalf;
    sign[i] = (i & kHalf) ? -1.0f : 1.0f;
  }
  return madd(x, sign, __builtin_shuffle(x, swap));
}

// Walsh-Hadamard transform in place, Sylvester order, unscaled. Stages run from neighbours
// outwards, so every instruction set rounds alike.
static inline void hadamard(float* x, int dim) {
  for (int i = 0; i < dim; i += kLanes) {
    vf v = load(x + i);
    v = butterfly<1>(v);
    v = butterfly<2>(v);
    if constexpr (kLanes >= 8) v = butterfly<4>(v);
    if constexpr (kLanes >= 16) v = butterfly<8>(v);
    store(x + i, v);
  }
  for (int half = kLanes; half < dim; half *= 2) {
    for (int i = 0; i < dim; i += 2 * half) {
      for (int j = i; j < i + half; j += kLanes) {
        const vf a = load(x + j), b = load(x + j + half);
        store(x + j, a + b);
        store(x + j + half, a - b);
      }
    }
  }
}

// x = Walsh-Hadamard rotation of x [kVectors * kLanes], which stays in registers: the same bits.
template <int kVectors>
static inline void rotate_in_registers(const float* signs, vf scale, float* x) {
  vf v[kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    v[c] = butterfly<1>(load(x + c * kLanes) * load(signs + c * kLanes));
    v[c] = butterfly<2>(v[c]);
    if constexpr (kLanes >= 8) v[c] = butterfly<4>(v[c]);
    if constexpr (kLanes >= 16) v[c] = butterfly<8>(v[c]);
  }
#pragma GCC unroll 8
  for (int half = 1; half < kVectors; half *= 2) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      if (c & half) continue;
      const vf a = v[c], b = v[c + half];
      v[c] = a + b;
      v[c + half] = a - b;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) store(x + c * kLanes, v[c] * scale);
}

// kVectors vectors of dst[r] = M^T src[r], from column i on, for kRows rows r. Every sum has one
// order, whatever the blocking; one sum alone would wait for itself.
template <int kRows, int kVectors>
static inline void multiply_block(const float* matrix, int rows, int columns, int i,
                                  const float* src, float* dst) {
  vf acc[kRows][kVectors] = {};
  for (int j = 0; j < rows; ++j) {
    const float* row = matrix + (int64_t)j * columns + i;
    for (int r = 0; r < kRows; ++r) {
      const vf x = splat(src[r * rows + j]);
      for (int c = 0; c < kVectors; ++c) acc[r][c] = madd(x, load(row + c * kLanes), acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store(dst + r * columns + i + c * kLanes, acc[r][c]);
  }
}

template <int kRows>
static inline void multiply_rows(const float* matrix, int rows, int columns, const float* src,
                                 float* dst) {
  constexpr int kVectors = 8 / kRows;
  int i = 0;
  for (; i + kVectors * kLanes <= columns; i += kVectors * kLanes) {
    multiply_block<kRows, kVectors>(matrix, rows, columns, i, src, dst);
  }
  for (; i < columns; i += kLanes) multiply_block<kRows, 1>(matrix, rows, columns, i, src, dst);
}

// dst[r] = M^T src[r] for row-major M [rows, columns] and `count` rows r; dst must not alias src.
static inline void multiply_transposed(const float* matrix, int rows, int columns, int count,
                                       const float* src, float* dst) {
  int r = 0;
  for (; r + 4 <= count; r += 4) {
    multiply_rows<4>(matrix, rows, columns, src + r * rows, dst + r * columns);
  }
  for (; r + 2 <= count; r += 2) {
    multiply_rows<2>(matrix, rows, columns, src + r * rows, dst + r * columns);
  }
  if (r < count) multiply_rows<1>(matrix, rows, columns, src + r * rows, dst + r * columns);
}

// dst = M^T src for M [rows, columns] of bfloat16 numbers, two rows in a word: the same sums as
// above, and half the bytes, which are the limit where a matrix is read for one vector.
template <int kVectors>
static inline void multiply_halves(const uint32_t* words, int rows, int columns, int i,
                                   const float* src, float* dst) {
  vf acc[kVectors] = {};
  for (int j = 0; j < rows; j += 2, words += columns) {
    const vf even = splat(src[j]), odd = splat(src[j + 1]);
    for (int c = 0; c < kVectors; ++c) {
      const float* at = reinterpret_cast<const float*>(words + i + c * kLanes);
      const vi pair = (vi)in_register(load(at));
      acc[c] = madd(even, (vf)(pair << 16), acc[c]);
      acc[c] = madd(odd, (vf)(pair & (int32_t)0xFFFF0000), acc[c]);
    }
  }
  for (int c = 0; c < kVectors; ++c) store(dst + i + c * kLanes, acc[c]);
}

static inline void multiply_halves(const uint32_t* words, int rows, int columns, const float* src,
                                   float* dst) {
  int i = 0;
  for (; i + 8 * kLanes <= columns; i += 8 * kLanes) {
    multiply_halves<8>(words, rows, columns, i, src, dst);
  }
  for (; i < columns; i += kLanes) multiply_halves<1>(words, rows, columns, i, src, dst);
}

// x = rotation of x (inverse: its transpose).
static inline void rotate(const FqCodec& codec, float* x, bool inverse) {
  const int dim = codec.head_dim;
  if (codec.rotation_signs) {
    const vf scale = splat(1.0f / __builtin_sqrtf((float)dim));
    if (!inverse && dim == 8 * kLanes) {
      return rotate_in_registers<8>(codec.rotation_signs, scale, x);
    }
    if (!inverse && dim == 4 * kLanes) {
      return rotate_in_registers<4>(codec.rotation_signs, scale, x);
    }
    if (!inverse) {
      for (int i = 0; i < dim; i += kLanes)
        store(x + i, load(x + i) * load(codec.rotation_signs + i));
    }
    hadamard(x, dim);
    for (int i = 0; i < dim; i += kLanes) {
      vf v = load(x + i) * scale;
      if (inverse) v = v * load(codec.rotation_signs + i);
      store(x + i, v);
    }
  } else {
    alignas(64) float copy[kMaxHeadDim];
    memcpy(copy, x, (size_t)dim * 4);
    multiply_transposed(inverse ? codec.rotation_matrix : codec.rotation_matrix_t, dim, dim, 1,
                        copy, x);
  }
}

}  // namespace fq::FQ_ISA
