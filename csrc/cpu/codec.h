// SPDX-License-Identifier: Apache-2.0
// The codec's inner loops: rotation, nearest codeword, packing, and codes back to floats.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

constexpr int kMaxHeadDim = 512;

// ---- rotation -----------------------------------------------------------------------------------

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

// dst = M^T src for row-major M [dim, dim]; dst must not alias src.
static inline void multiply_transposed(const float* matrix, int dim, const float* src, float* dst) {
  for (int i = 0; i < dim; i += kLanes) {
    vf acc = vf{};
    for (int j = 0; j < dim; ++j) acc = madd(splat(src[j]), load(matrix + (int64_t)j * dim + i), acc);
    store(dst + i, acc);
  }
}

// x = rotation of x (inverse: its transpose).
static inline void rotate(const FqCodec& codec, float* x, bool inverse) {
  const int dim = codec.head_dim;
  if (codec.rotation_signs) {
    const vf scale = splat(1.0f / __builtin_sqrtf((float)dim));
    if (!inverse) {
      for (int i = 0; i < dim; i += kLanes) store(x + i, load(x + i) * load(codec.rotation_signs + i));
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
    multiply_transposed(inverse ? codec.rotation_matrix : codec.rotation_matrix_t, dim, copy, x);
  }
}

// ---- indices ------------------------------------------------------------------------------------

// Index i of a field packed LSB first. Reads up to 3 bytes from the index's first byte: the norms
// that follow the indices in a record keep that inside it.
static inline uint32_t unpack_index(const uint8_t* field, int i, int bits) {
  const uint32_t bit = (uint32_t)(i * bits);
  const uint8_t* p = field + (bit >> 3);
  const uint32_t word = (uint32_t)p[0] | ((uint32_t)p[1] << 8) | ((uint32_t)p[2] << 16);
  return (word >> (bit & 7)) & ((1u << bits) - 1);
}

static inline void pack_index(uint8_t* field, int i, int bits, uint32_t index) {
  const uint32_t bit = (uint32_t)(i * bits);
  uint8_t* p = field + (bit >> 3);
  const uint32_t word = index << (bit & 7);
  p[0] |= (uint8_t)word;
  if ((bit & 7) + bits > 8) p[1] |= (uint8_t)(word >> 8);
  if ((bit & 7) + bits > 16) p[2] |= (uint8_t)(word >> 16);
}

// ---- codes to floats ----------------------------------------------------------------------------

typedef uint32_t v4u __attribute__((vector_size(16)));

static inline v4 flip(v4 x, const float* signs) {
  return (v4)((v4u)x ^ (v4u) * reinterpret_cast<const v4*>(signs));
}

// Writes the unit-norm rotated vector of each of `count` records, [count, head_dim] floats.
// kDim, kBits, kFolded fix subvec_dim, index_bits and folded; kDim 0 reads them from the code.
template <int kDim, int kBits, bool kFolded>
static void decode_records(const FqCode& code, int head_dim, const uint8_t* field,
                           int64_t record_bytes, int count, float* dst) {
  const float* rows = code.rows;
  const int num_subvecs = head_dim / (kDim ? kDim : code.subvec_dim);
  for (int t = 0; t < count; ++t, field += record_bytes, dst += head_dim) {
    if constexpr (kDim == 2 && kBits == 8) {
      for (int s = 0; s < num_subvecs; ++s) memcpy(dst + 2 * s, rows + 2 * field[s], 8);
    } else if constexpr (kDim == 4 && kBits == 8) {
      for (int s = 0; s < num_subvecs; ++s) {
        *reinterpret_cast<v4*>(dst + 4 * s) = *reinterpret_cast<const v4*>(rows + 4 * field[s]);
      }
    } else if constexpr (kDim == 8 && kBits == 8) {
      for (int s = 0; s < num_subvecs; ++s) {
        *reinterpret_cast<v8_any*>(dst + 8 * s) =
            *reinterpret_cast<const v8_any*>(rows + 8 * field[s]);
      }
    } else if constexpr (kDim == 4 && kBits == 12 && kFolded) {
      // Two indices in three bytes; each is 8 bits of magnitude below 4 bits of sign.
      for (int s = 0; s < num_subvecs; s += 2) {
        uint32_t w;
        memcpy(&w, field + s + s / 2, 4);
        const v4 a = *reinterpret_cast<const v4*>(rows + 4 * (w & 0xFF));
        const v4 b = *reinterpret_cast<const v4*>(rows + 4 * ((w >> 12) & 0xFF));
        *reinterpret_cast<v4*>(dst + 4 * s) = flip(a, code.signs + 4 * ((w >> 8) & 0xF));
        *reinterpret_cast<v4*>(dst + 4 * s + 4) = flip(b, code.signs + 4 * ((w >> 20) & 0xF));
      }
    } else {
      const int dim = code.subvec_dim, bits = code.index_bits;
      for (int s = 0; s < num_subvecs; ++s) {
        const uint32_t index = unpack_index(field, s, bits);
        const float* row = rows + (int64_t)(index & (code.num_rows - 1)) * dim;
        const uint32_t pattern = code.folded ? index / code.num_rows : 0;
        for (int j = 0; j < dim; ++j) dst[s * dim + j] = (pattern >> j & 1) ? -row[j] : row[j];
      }
    }
  }
}

typedef void (*DecodeRecords)(const FqCode&, int, const uint8_t*, int64_t, int, float*);

// The kernels that exist in specialised form; everything else takes the general one.
static inline DecodeRecords decode_kernel(const FqCode& code, int head_dim) {
  const int dim = code.subvec_dim, bits = code.index_bits;
  if (!code.folded && bits == 8) {
    if (dim == 2) return decode_records<2, 8, false>;
    if (dim == 4) return decode_records<4, 8, false>;
    if (dim == 8) return decode_records<8, 8, false>;
  }
  if (code.folded && bits == 12 && dim == 4 && head_dim % 8 == 0) return decode_records<4, 12, true>;
  return decode_records<0, 0, false>;
}

// ---- floats to codes ----------------------------------------------------------------------------

// Nearest codewords of kCount subvectors y, each at stride `dim`: argmax <y, c> - |c|^2 / 2, ties
// to the lowest index. Lanes are codewords.
template <int kDim, int kCount>
static inline void nearest(const FqCode& code, const float* y, uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int num_rows = code.num_rows_padded;
  vf coords[kCount][kDim ? kDim : 64];
  vf best[kCount];
  vi best_row[kCount];
  for (int s = 0; s < kCount; ++s) {
    for (int j = 0; j < dim; ++j) coords[s][j] = splat(y[s * dim + j]);
    best[s] = splat(kMinusInf);
    best_row[s] = vi{};
  }
  vi row;
  for (int i = 0; i < kLanes; ++i) row[i] = i;
  for (int n = 0; n < num_rows; n += kLanes, row += kLanes) {
    const vf minus_half_sq = -load(code.half_sq + n);
    vf score[kCount];
    for (int s = 0; s < kCount; ++s) score[s] = minus_half_sq;
    for (int j = 0; j < dim; ++j) {
      const vf c = load(code.rows_t + (int64_t)j * num_rows + n);
      for (int s = 0; s < kCount; ++s) score[s] = madd(c, coords[s][j], score[s]);
    }
    for (int s = 0; s < kCount; ++s) {
      const vi better = score[s] > best[s];
      best[s] = vmax(score[s], best[s]);
      best_row[s] = better ? row : best_row[s];
    }
  }
  for (int s = 0; s < kCount; ++s) {
    float top = best[s][0];
    int32_t winner = best_row[s][0];
    for (int i = 1; i < kLanes; ++i) {
      if (best[s][i] > top || (best[s][i] == top && best_row[s][i] < winner)) {
        top = best[s][i];
        winner = best_row[s][i];
      }
    }
    index[s] = (uint32_t)winner;
  }
}

template <int kDim>
static inline void nearest_all(const FqCode& code, int num_subvecs, const float* y, uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  int s = 0;
  for (; s + 4 <= num_subvecs; s += 4) nearest<kDim, 4>(code, y + s * dim, index + s);
  for (; s < num_subvecs; ++s) nearest<kDim, 1>(code, y + s * dim, index + s);
}

// Encodes x [head_dim] (overwritten) into a zeroed index field and a norm.
// Returns false, storing the zero vector, when x holds a NaN or infinity.
static inline bool encode_vector(const FqCodec& codec, const FqCode& code, float* x, uint8_t* field,
                                 uint16_t* norm) {
  const int head_dim = codec.head_dim, dim = code.subvec_dim;
  *norm = 0;
  float largest = 0.0f;
  for (int i = 0; i < head_dim; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    if (!(magnitude < __builtin_inff())) return false;
    largest = fmax2(largest, magnitude);
  }
  if (largest < 1.17549435e-38f) return true;  // zero, or below the least normal float

  // Dividing by the largest coordinate first keeps squares of any finite input finite.
  for (int i = 0; i < head_dim; ++i) x[i] = x[i] / largest;
  rotate(codec, x, false);
  float partial[16] = {};
  for (int i = 0; i < head_dim; i += 16) {
    for (int j = 0; j < 16; ++j) partial[j] += x[i + j] * x[i + j];
  }
  float length_sq = 0.0f;
  for (int j = 0; j < 16; ++j) length_sq += partial[j];
  const float length = __builtin_sqrtf(length_sq);
  for (int i = 0; i < head_dim; ++i) x[i] = x[i] / length;

  const int num_subvecs = head_dim / dim;
  uint32_t index[kMaxHeadDim], pattern[kMaxHeadDim];
  alignas(64) float folded[kMaxHeadDim];
  const float* y = x;
  if (code.folded) {
    for (int s = 0; s < num_subvecs; ++s) {
      pattern[s] = 0;
      for (int j = 0; j < dim; ++j) {
        pattern[s] |= (uint32_t)(x[s * dim + j] < 0.0f) << j;
        folded[s * dim + j] = __builtin_fabsf(x[s * dim + j]);
      }
    }
    y = folded;
  }
  if (dim == 2) {
    nearest_all<2>(code, num_subvecs, y, index);
  } else if (dim == 4) {
    nearest_all<4>(code, num_subvecs, y, index);
  } else if (dim == 8) {
    nearest_all<8>(code, num_subvecs, y, index);
  } else {
    nearest_all<0>(code, num_subvecs, y, index);
  }

  // <y, v> and |v|^2 of the decoded direction v; the signs of a folded code cancel in both.
  float dot = 0.0f, decoded_sq = 0.0f;
  for (int s = 0; s < num_subvecs; ++s) {
    const float* row = code.rows + (int64_t)index[s] * dim;
    for (int j = 0; j < dim; ++j) {
      dot += y[s * dim + j] * row[j];
      decoded_sq += row[j] * row[j];
    }
    const uint32_t full = code.folded ? pattern[s] * (uint32_t)code.num_rows + index[s] : index[s];
    pack_index(field, s, code.index_bits, full);
  }
  float gain = length;
  if (code.gain == kFqPreserve) gain = length / __builtin_sqrtf(fmax2(decoded_sq, 1e-12f));
  if (code.gain == kFqMse) gain = length * fmax2(dot, 0.0f) / fmax2(decoded_sq, 1e-12f);
  if (code.gain == kFqUnbiased) gain = length / fmax2(dot, 0.25f);
  gain *= largest;
  *norm = float_to_half(gain < 65504.0f ? gain : 65504.0f);
  return true;
}

}  // namespace fq::FQ_ISA
