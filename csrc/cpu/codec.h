// SPDX-License-Identifier: Apache-2.0
// The codec's inner loops: packing, and codes back to floats.
#pragma once

#include <type_traits>

#include "cpu/nearest.h"
#include "cpu/params.h"
#include "cpu/rotate.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

// ---- indices ------------------------------------------------------------------------------------

// Index i of a field packed LSB first. Reads up to 3 bytes from the index's first byte: the norms
// that follow the indices in a record, two bytes or more, keep that inside it.
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

// ---- norms --------------------------------------------------------------------------------------

static inline float load_norm(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, sizeof(half));
  return half_to_float(half);
}

// `half`: the bits of a float16 of at least 0.
static inline void store_norm(uint16_t half, uint8_t* p) { memcpy(p, &half, sizeof(half)); }

// ---- codes to floats ----------------------------------------------------------------------------

typedef int32_t v4i __attribute__((vector_size(16)));
typedef double v2d __attribute__((vector_size(16)));
typedef double double_any __attribute__((may_alias));

constexpr int kUnit = 16;                 // coordinates decoded from one word of indices
constexpr int kPerUnit = kUnit / kLanes;  // vectors in a unit

template <class T>
static inline T read(const uint8_t* p) {
  T x;
  memcpy(&x, p, sizeof(x));
  return x;
}

// The codes of one side of the cache, read a unit at a time. kDim and kFolded fix subvec_dim and
// folded; codebooks with a fast path have 256 rows, so an index is a byte, or in a folded code a
// byte of magnitude below kDim sign bits.
//
// Loads are what decoding runs out of first: indices come as one or two words per unit, and shifts
// and masks turn them into byte offsets.
template <int kDim, bool kFolded>
struct Codes {
  static_assert(kDim == 2 || kDim == 4 || (kDim == 8 && !kFolded));
  static constexpr int kBits = kFolded ? 8 + kDim : 8;
  static constexpr size_t kHalfBytes = kBits / kDim;     // bytes of the indices of 8 coordinates
  static constexpr bool kSpills = kFolded && kDim == 2;  // leaves few registers to its callers
  const float* rows;

  struct PlainWord {
    uint64_t low;  // indices of 16 coordinates
    const uint8_t* field;
  };
  struct FoldedWord {
    uint64_t low, high;  // indices of 8 coordinates each
    const uint8_t* field;
  };
  using Word = std::conditional_t<kFolded, FoldedWord, PlainWord>;

  // The indices of coordinates i to i + 15 of a vector, i a multiple of 16.
  Word word(const uint8_t* field, size_t i) const {
    field += i / 8 * kHalfBytes;
    if constexpr (kFolded) {
      // Reads past the indices by 1 byte, or by 3 with kDim 2, which the norms behind them keep in
      // the record.
      using T = std::conditional_t<kDim == 2, uint64_t, uint32_t>;
      return {read<T>(field), read<T>(field + kHalfBytes), field};
    } else {
      Word w = {0, field};
      memcpy(&w.low, field, 2 * kHalfBytes);
      return w;
    }
  }

  // The start of the unit's codeword number n, as a T.
  template <class T>
  T row(const Word& w, int n) const {
    constexpr int kScale = kDim == 2 ? 3 : kDim == 4 ? 4 : 5;  // log2 of the bytes of a codeword
    constexpr int kPerHalf = 8 / kDim;
    uint64_t bits = w.low;
    if constexpr (kFolded) bits = n < kPerHalf ? w.low : w.high;
    const int shift = kBits * (kFolded ? n % kPerHalf : n);
    const uint64_t scaled = shift >= kScale ? bits >> (shift - kScale) : bits << (kScale - shift);
    const char* at = reinterpret_cast<const char*>(rows) + (scaled & (0xFFu << kScale));
    return *reinterpret_cast<const T*>(at);
  }

  // Coordinates 4 * q to 4 * q + 3 of the unit, signs of folded codes aside.
  v4 quad(const Word& w, int q) const {
    if constexpr (kDim == 2) {
      return (v4)v2d{row<double_any>(w, 2 * q), row<double_any>(w, 2 * q + 1)};
    } else if constexpr (kDim == 4) {
      return row<v4>(w, q);
    } else {
      struct Pair {
        v4 half[2];
      };
      return row<Pair>(w, q / 2).half[q % 2];
    }
  }

  // Vector c of the unit: coordinates c * kLanes to (c + 1) * kLanes - 1.
  vf at(const Word& w, int c) const {
    if constexpr (kDim == 8 && kLanes == 8) return row<vf_any>(w, c);
    v4 quads[kLanes / 4];
    for (int j = 0; j < kLanes / 4; ++j) quads[j] = quad(w, c * (kLanes / 4) + j);
    vf x = join(quads);
    if constexpr (kFolded) x = (vf)((vi)x ^ signs(w, c));
    return x;
  }

#if defined(FQ_AVX2) || defined(FQ_AVX512)
  // Sign bits of 8 coordinates, each shifted to the top of its lane.
  static __m256i signs8(const Word& w, int half) {
    const uint8_t* field = w.field + half * kHalfBytes;
    __m256i bits;
    if constexpr (kDim == 4) {
      const int32_t word = read<int32_t>(field);
      const __m256i shift = _mm256_setr_epi32(23, 22, 21, 20, 11, 10, 9, 8);
      bits = _mm256_sllv_epi32(_mm256_set1_epi32(word), shift);
    } else {
      // 64-bit lane n holds codeword n: its second sign goes to bit 63, its first to bit 62, 31.
      const int64_t word = read<int64_t>(field);
      const __m256i shift = _mm256_setr_epi64x(54, 44, 34, 24);
      const __m256i second = _mm256_sllv_epi64(_mm256_set1_epi64x(word), shift);
      bits = _mm256_blend_epi32(_mm256_srli_epi64(second, 31), second, 0xAA);
    }
    return _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MIN));
  }
#endif

  // Sign bits of vector c of the unit.
  static vi signs(const Word& w, int c) {
#if defined(FQ_AVX512)
    (void)c;  // a unit is one vector
    return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(signs8(w, 0)), signs8(w, 1), 1);
#elif defined(FQ_AVX2)
    return (vi)signs8(w, c);
#else
    vi bits;
    for (int j = 0; j < kLanes; ++j) {
      const int i = c * kLanes + j;
      bits[j] = (int32_t)((i < 8 ? w.low : w.high) >> (i % 8 / kDim * kBits + 8 + i % kDim) << 31);
    }
    return bits;
#endif
  }
};

// Writes `num_coords` coordinates of the unit-norm vectors of `count` records, whose indices begin
// at byte `offset` of a record's; vectors have `stride` floats.
template <class C>
static inline void decode_part(const FqCode& code, int num_coords, const uint8_t* const* fields,
                               size_t offset, int count, float* dst, int stride) {
  const C codes = {code.rows};
  for (int t = 0; t < count; ++t, dst += stride) {
    for (size_t i = 0; i < (size_t)num_coords; i += kUnit) {
      const auto word = codes.word(fields[t] + offset, i);
      for (int c = 0; c < kPerUnit; ++c) store(dst + i + c * kLanes, codes.at(word, c));
    }
  }
}

// Writes the unit-norm rotated vectors of `count` records, [count, head_dim] floats.
template <class C>
static void decode_records(const FqCode& code, int head_dim, const uint8_t* const* fields,
                           int count, float* dst) {
  decode_part<C>(code, head_dim, fields, 0, count, dst, head_dim);
}

// The same for any code.
static void decode_records_any(const FqCode& code, int head_dim, const uint8_t* const* fields,
                               int count, float* dst) {
  const int dim = code.subvec_dim, bits = code.index_bits, num_subvecs = head_dim / dim;
  for (int t = 0; t < count; ++t) {
    for (int s = 0; s < num_subvecs; ++s, dst += dim) {
      const uint32_t index = unpack_index(fields[t], s, bits);
      const float* row = code.rows + (int64_t)(index & (code.num_rows - 1)) * dim;
      const uint32_t pattern = code.folded ? index / code.num_rows : 0;
      for (int j = 0; j < dim; ++j) dst[j] = (pattern >> j & 1) ? -row[j] : row[j];
    }
  }
}

// ---- floats to codes ----------------------------------------------------------------------------

constexpr float kMinNormal = 1.17549435e-38f;

// The largest magnitude among the coordinates of x, or infinity if one is a NaN or infinite.
static inline float peak(const float* x, int count) {
  vf largest = {};
  vi finite = vi{} - 1;
  for (int i = 0; i < count; i += kLanes) {
    const vf magnitude = vabs(load(x + i));
    finite &= magnitude < __builtin_inff();
    largest = vmax(largest, magnitude);
  }
  return lane_bits(finite) == (1u << kLanes) - 1 ? max_lane(largest) : __builtin_inff();
}

// 16 partial sums of terms added in turn, in one order whatever kLanes is.
struct Sum16 {
  vf part[kPerUnit] = {};
  void add(int i, vf x) { part[i] = part[i] + x; }
  void store_to(float* parts) const {
    for (int i = 0; i < kPerUnit; ++i) store(parts + i * kLanes, part[i]);
  }
};

// Their sum. It is asked for when the partial sums of all vectors of a batch are there: such sums
// wait for each other's terms, and those of several vectors can wait together.
static inline float total(const float* parts) {
  float sum = 0.0f;
  for (int j = 0; j < 16; ++j) sum += parts[j];
  return sum;
}

static inline void divide(float* x, int count, float by) {
  const vf divisor = splat(by);
  for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) / divisor);
}

// What a vector's direction was divided by: its length is peak * length. peak is 0 for the zero
// vector, whose direction is 0, and infinity for one with a NaN or infinity, stored as the zero
// vector.
struct Magnitude {
  float peak, length;
};

// Divides each of `count` vectors x, of which no square overflows, by its length, which size gets;
// zeros stay. `parts` is scratch, [count, 16].
static inline void normalise(int count, int dim, float* x, Magnitude* size, float* parts) {
  for (int n = 0; n < count; ++n) {
    Sum16 squares;
    for (int i = 0; i < dim; i += kUnit) {
      for (int c = 0; c < kPerUnit; ++c) {
        const vf v = load(x + n * dim + i + c * kLanes);
        squares.add(c, v * v);
      }
    }
    squares.store_to(parts + 16 * n);
  }
  for (int n = 0; n < count; ++n) size[n].length = __builtin_sqrtf(total(parts + 16 * n));
  for (int n = 0; n < count; ++n) {
    if (size[n].length > 0.0f) divide(x + n * dim, dim, size[n].length);
  }
}

// Each of `count` vectors x [head_dim] becomes its rotated direction. `parts` as in `normalise`.
static inline void to_directions(const FqCodec& codec, int count, float* x, Magnitude* size,
                                 float* parts) {
  const int dim = codec.head_dim;
  for (int n = 0; n < count; ++n) size[n].peak = peak(x + n * dim, dim);
  for (int n = 0; n < count; ++n) {
    float* v = x + n * dim;
    if (size[n].peak == __builtin_inff() || size[n].peak < kMinNormal) {
      memset(v, 0, (size_t)dim * 4);
      if (size[n].peak < kMinNormal) size[n].peak = 0.0f;
      continue;
    }
    // Dividing by the largest coordinate first keeps squares of any finite input finite.
    divide(v, dim, size[n].peak);
    rotate(codec, v, false);
  }
  normalise(count, dim, x, size, parts);
}

// Takes the signs from the directions x of some vectors: `patterns` gets each subvector's, bit j
// that of coordinate j.
template <int kDim>
static inline void fold(int num_subvecs, float* x, uint32_t* patterns) {
  constexpr int kCount = kLanes / kDim;
  for (int s = 0; s < num_subvecs; s += kCount, x += kLanes) {
    const vf v = load(x);
    const uint32_t bits = lane_bits(v < 0.0f);
    for (int j = 0; j < kCount; ++j) patterns[s + j] = bits >> (j * kDim) & ((1u << kDim) - 1);
    store(x, vabs(v));
  }
}

static inline void fold(const FqCode& code, int num_subvecs, float* x, uint32_t* patterns) {
  const int dim = code.subvec_dim;
  if (dim == 2) return fold<2>(num_subvecs, x, patterns);
  if (dim == 4) return fold<4>(num_subvecs, x, patterns);
  for (int s = 0; s < num_subvecs; ++s, x += dim) {
    patterns[s] = 0;
    for (int j = 0; j < dim; ++j) {
      patterns[s] |= (uint32_t)(x[j] < 0.0f) << j;
      x[j] = __builtin_fabsf(x[j]);
    }
  }
}

// The rows that `index` names, one behind the other.
template <int kDim>
static inline void copy_rows(const FqCode& code, const uint32_t* index, int num_subvecs,
                             float* out) {
  const int dim = kDim ? kDim : code.subvec_dim;
  for (int s = 0; s < num_subvecs; ++s, out += dim) {
    memcpy(out, code.rows + (int64_t)index[s] * dim, (size_t)dim * 4);
  }
}

static inline void copy_rows(const FqCode& code, const uint32_t* index, int num_subvecs,
                             float* out) {
  if (code.subvec_dim == 2) return copy_rows<2>(code, index, num_subvecs, out);
  if (code.subvec_dim == 4) return copy_rows<4>(code, index, num_subvecs, out);
  if (code.subvec_dim == 8) return copy_rows<8>(code, index, num_subvecs, out);
  copy_rows<0>(code, index, num_subvecs, out);
}

// The partial sums of <y, v> and of |v|^2 of `count` coordinates, a multiple of 16: [2, 16].
static inline void dot_and_square(const float* y, const float* v, int count, float* parts) {
  Sum16 dots, squares;
  for (int i = 0; i < count; i += kUnit) {
    for (int c = 0; c < kPerUnit; ++c) {
      const vf decoded = load(v + i + c * kLanes);
      dots.add(c, load(y + i + c * kLanes) * decoded);
      squares.add(c, decoded * decoded);
    }
  }
  dots.store_to(parts);
  squares.store_to(parts + 16);
}

// The lowest byte of each index.
static inline void to_bytes(const uint32_t* index, int count, uint8_t* bytes) {
  typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    const Words words = *reinterpret_cast<const Words*>(index + i);
    *reinterpret_cast<Bytes*>(bytes + i) = __builtin_convertvector(words, Bytes);
  }
  for (; i < count; ++i) bytes[i] = (uint8_t)index[i];
}

// The same bytes as pack_index of num_subvecs indices, a multiple of 4, of kBits each: an even
// number, at most 16.
template <int kBits>
static inline void pack_fours(const FqCode& code, int num_subvecs, const uint32_t* index,
                              const uint32_t* patterns, uint8_t* field) {
  static_assert(kBits % 2 == 0 && kBits <= 16);
  for (int s = 0; s < num_subvecs; s += 4, field += kBits / 2) {
    uint64_t word = 0;
    for (int j = 0; j < 4; ++j) {
      const uint32_t sign = patterns[s + j] * (uint32_t)code.num_rows;
      word |= (uint64_t)(sign + index[s + j]) << (kBits * j);
    }
    memcpy(field, &word, kBits / 2);  // little-endian, as pages are
  }
}

// Packs the indices of one vector into a zeroed field.
static inline void pack_indices(const FqCode& code, int num_subvecs, const uint32_t* index,
                                const uint32_t* patterns, uint8_t* field) {
  if (code.index_bits == 8 && !code.folded) {
    return to_bytes(index, num_subvecs, field);
  }
  if (code.folded && num_subvecs % 4 == 0) {
    if (code.index_bits == 12) return pack_fours<12>(code, num_subvecs, index, patterns, field);
    if (code.index_bits == 10) return pack_fours<10>(code, num_subvecs, index, patterns, field);
  }
  for (int s = 0; s < num_subvecs; ++s) {
    const uint32_t sign = code.folded ? patterns[s] * (uint32_t)code.num_rows : 0;
    pack_index(field, s, code.index_bits, sign + index[s]);
  }
}

// The norm of a vector whose direction is y: v is what its indices stand for, and the signs of a
// folded code cancel. `parts` are dot_and_square's.
static inline uint16_t norm_of(const FqCode& code, Magnitude size, const float* parts) {
  if (size.peak == 0.0f || size.peak == __builtin_inff()) return 0;
  const float dot = total(parts), decoded_sq = total(parts + 16);
  float gain = size.length;
  if (code.gain == kFqPreserve) gain = size.length / __builtin_sqrtf(fmax2(decoded_sq, 1e-12f));
  if (code.gain == kFqMse) gain = size.length * fmax2(dot, 0.0f) / fmax2(decoded_sq, 1e-12f);
  if (code.gain == kFqUnbiased) gain = size.length / fmax2(dot, 0.25f);
  gain *= size.peak;
  return float_to_half(gain < 65504.0f ? gain : 65504.0f);
}

}  // namespace fq::FQ_ISA
