// SPDX-License-Identifier: Apache-2.0
// Vectors of 64 bytes: look-ups in tables of 256 bytes that lie in registers, and dot products of
// bytes. With AVX-512 VBMI and VNNI each function is a few instructions. FQ_BYTE_MODEL compiles the
// same functions as loops, for tests anywhere; both give the same bits.
#pragma once

#include "cpu/simd.h"

#if defined(FQ_BYTE_MODEL) || (defined(__AVX512VBMI__) && defined(__AVX512VNNI__))
#define FQ_BYTES
#endif

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

static_assert(kLanes == 16, "bytes are multiplied into 16 lanes");

typedef uint8_t vb __attribute__((vector_size(64)));
typedef uint8_t vb_any __attribute__((vector_size(64), aligned(1), may_alias));
typedef int32_t vi_any __attribute__((vector_size(64), aligned(1), may_alias));

static inline vb load_bytes(const uint8_t* p) { return *reinterpret_cast<const vb_any*>(p); }
static inline void store_bytes(uint8_t* p, vb x) { *reinterpret_cast<vb_any*>(p) = x; }
static inline vb splat_byte(uint8_t x) { return vb{} + x; }
static inline vi load_ints(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
static inline void store_ints(int32_t* p, vi x) { *reinterpret_cast<vi_any*>(p) = x; }
static inline vf to_floats(vi x) { return __builtin_convertvector(x, vf); }

// 32-bit lanes that all hold the four bytes at p.
static inline vi splat_quad(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
#if defined(FQ_BYTE_MODEL)
  return vi{} + x;
#else
  return (vi)_mm512_set1_epi32(x);
#endif
}

// Part n of four gets the first `count` bytes, at most 16, at p[n]; the others are 0 and not read.
static inline vb load_four(const uint8_t* const* p, int count) {
#if defined(FQ_BYTE_MODEL)
  vb x = {};
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < count; ++i) x[16 * n + i] = p[n][i];
  }
  return x;
#else
  const auto load16 = [&](int n) {
    if (count == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[n]));
    return _mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), p[n]);
  };
  __m512i x = _mm512_castsi128_si512(load16(0));
  x = _mm512_inserti32x4(x, load16(1), 1);
  x = _mm512_inserti32x4(x, load16(2), 2);
  return (vb)_mm512_inserti32x4(x, load16(3), 3);
#endif
}

// Each half gets the first `count` bytes, at most 32, at p[n]; the others are 0 and not read.
static inline vb load_two(const uint8_t* p0, const uint8_t* p1, int count) {
#if defined(FQ_BYTE_MODEL)
  vb x = {};
  for (int i = 0; i < count; ++i) {
    x[i] = p0[i];
    x[32 + i] = p1[i];
  }
  return x;
#else
  const __mmask32 mask = (__mmask32)((1ull << count) - 1);
  const __m256i low = _mm256_maskz_loadu_epi8(mask, p0), high = _mm256_maskz_loadu_epi8(mask, p1);
  return (vb)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}

// out[i] = x[order[i]], order below 64.
static inline vb permute(vb order, vb x) {
#if defined(FQ_BYTE_MODEL)
  vb out;
  for (int i = 0; i < 64; ++i) out[i] = x[order[i] & 63];
  return out;
#else
  return (vb)_mm512_permutexvar_epi8((__m512i)order, (__m512i)x);
#endif
}

// out[i] = byte order[i] of a and, from 64 on, of b; order below 128.
static inline vb permute(vb order, vb a, vb b) {
#if defined(FQ_BYTE_MODEL)
  vb out;
  for (int i = 0; i < 64; ++i) out[i] = (order[i] & 64) ? b[order[i] & 63] : a[order[i] & 63];
  return out;
#else
  return (vb)_mm512_permutex2var_epi8((__m512i)a, (__m512i)order, (__m512i)b);
#endif
}

// Byte i of each 8 gets the 8 bits of them that begin at bit shift[i], which is below 57.
static inline vb fields_at(vb shift, vb x) {
#if defined(FQ_BYTE_MODEL)
  vb out;
  for (int q = 0; q < 64; q += 8) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= (uint64_t)x[q + i] << (8 * i);
    for (int i = 0; i < 8; ++i) out[q + i] = (uint8_t)(word >> (shift[q + i] & 63));
  }
  return out;
#else
  return (vb)_mm512_multishift_epi64_epi8((__m512i)shift, (__m512i)x);
#endif
}

// Bytes a[0], b[0], a[1], b[1], .. of the first half of each part of 16 bytes, or of the second.
static inline vb zip_bytes(int half, vb a, vb b) {
#if defined(FQ_BYTE_MODEL)
  vb out;
  for (int i = 0; i < 64; ++i) {
    const int from = i / 16 * 16 + 8 * half + i % 16 / 2;
    out[i] = i % 2 ? b[from] : a[from];
  }
  return out;
#else
  const __m512i x = (__m512i)a, y = (__m512i)b;
  return (vb)(half ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y));
#endif
}

// The same of words of two bytes.
static inline vb zip_words(int half, vb a, vb b) {
#if defined(FQ_BYTE_MODEL)
  vb out;
  for (int i = 0; i < 64; ++i) {
    const int from = i / 16 * 16 + 8 * half + i % 16 / 4 * 2 + i % 2;
    out[i] = i % 4 / 2 ? b[from] : a[from];
  }
  return out;
#else
  const __m512i x = (__m512i)a, y = (__m512i)b;
  return (vb)(half ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
#endif
}

// Magnitudes of signed bytes.
static inline vb absolute_bytes(vb x) {
#if defined(FQ_BYTE_MODEL)
  for (int i = 0; i < 64; ++i) x[i] = x[i] & 0x80 ? (uint8_t)-x[i] : x[i];
  return x;
#else
  return (vb)_mm512_abs_epi8((__m512i)x);
#endif
}

// Bit i is set where byte i has one of `bits`.
static inline uint64_t has_bits(vb x, uint8_t bits) {
#if defined(FQ_BYTE_MODEL)
  uint64_t out = 0;
  for (int i = 0; i < 64; ++i) out |= (uint64_t)((x[i] & bits) != 0) << i;
  return out;
#else
  if (bits == 0x80) return _mm512_movepi8_mask((__m512i)x);
  return _mm512_test_epi8_mask((__m512i)x, _mm512_set1_epi8((char)bits));
#endif
}

// ~x in the bytes of `which`, x in the others.
static inline vb complement(uint64_t which, vb x) {
#if defined(FQ_BYTE_MODEL)
  for (int i = 0; i < 64; ++i) x[i] = (which >> i & 1) ? (uint8_t)~x[i] : x[i];
  return x;
#else
  return (vb)_mm512_mask_sub_epi8((__m512i)x, which, _mm512_set1_epi8(-1), (__m512i)x);
#endif
}

// A table of 256 bytes.
struct Table {
  vb part[4];
};

static inline Table load_table(const uint8_t* p) {
  return {{load_bytes(p), load_bytes(p + 64), load_bytes(p + 128), load_bytes(p + 192)}};
}

// table[index[i]]; `high` must be has_bits(index, 0x80).
static inline vb look_up(const Table& table, vb index, uint64_t high) {
#if defined(FQ_BYTE_MODEL)
  (void)high;
  vb out;
  for (int i = 0; i < 64; ++i) out[i] = table.part[index[i] >> 6][index[i] & 63];
  return out;
#else
  const __m512i i = (__m512i)index;
  const __m512i low = _mm512_permutex2var_epi8((__m512i)table.part[0], i, (__m512i)table.part[1]);
  const __m512i top = _mm512_permutex2var_epi8((__m512i)table.part[2], i, (__m512i)table.part[3]);
  return (vb)_mm512_mask_mov_epi8(low, high, top);
#endif
}

// sum[i] += the products of four unsigned bytes and four signed ones.
static inline vi dot_bytes(vi sum, vb x, vb s) {
#if defined(FQ_BYTE_MODEL)
  for (int i = 0; i < 64; ++i) sum[i / 4] += (int32_t)x[i] * (int8_t)s[i];
  return sum;
#else
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)s);
#endif
}

// sum[i] += the products of two signed words and two others.
static inline vi dot_words(vi sum, vi x, vi y) {
#if defined(FQ_BYTE_MODEL)
  for (int i = 0; i < 16; ++i) {
    sum[i] += (int32_t)(int16_t)x[i] * (int16_t)y[i] + (x[i] >> 16) * (y[i] >> 16);
  }
  return sum;
#else
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
#endif
}

// The lanes of a, then those of b, as signed words, saturated.
static inline vi to_words(vi a, vi b) {
#if defined(FQ_BYTE_MODEL)
  int16_t words[32];
  for (int i = 0; i < 32; ++i) {
    const int32_t x = i < 16 ? a[i] : b[i - 16];
    words[i] = (int16_t)(x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x);
  }
  vi out;
  memcpy(&out, words, 64);
  return out;
#else
  const __m256i low = _mm512_cvtsepi32_epi16((__m512i)a), high = _mm512_cvtsepi32_epi16((__m512i)b);
  return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#endif
}

static inline vi min_ints(vi a, vi b) {
#if defined(FQ_BYTE_MODEL)
  return a < b ? a : b;
#else
  return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b);
#endif
}

static inline vi max_ints(vi a, vi b) {
#if defined(FQ_BYTE_MODEL)
  return a > b ? a : b;
#else
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#endif
}

// The float16 numbers in half n of two of x.
static inline vf halves_to_floats(vb x, int n) {
#if defined(FQ_BYTE_MODEL)
  vf out;
  for (int i = 0; i < 16; ++i) {
    out[i] = half_to_float((uint16_t)(x[32 * n + 2 * i] | x[32 * n + 2 * i + 1] << 8));
  }
  return out;
#else
  const __m512i all = (__m512i)x;
  return _mm512_cvtph_ps(n ? _mm512_extracti64x4_epi64(all, 1) : _mm512_castsi512_si256(all));
#endif
}

// Lane i gets the four bytes at p + 4 * number[i].
static inline vi load_quads(const uint8_t* p, vi number) {
#if defined(FQ_BYTE_MODEL)
  vi out;
  for (int i = 0; i < 16; ++i) {
    int32_t x;
    memcpy(&x, p + 4 * (int64_t)number[i], 4);
    out[i] = x;
  }
  return out;
#else
  return (vi)_mm512_i32gather_epi32((__m512i)number, p, 4);
#endif
}

// Stores the lowest byte of every lane.
static inline void store_low_bytes(uint8_t* p, vi x) {
#if defined(FQ_BYTE_MODEL)
  for (int i = 0; i < 16; ++i) p[i] = (uint8_t)x[i];
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#endif
}

// The nearest integer, ties to even, of numbers within 2^22 of 0.
static inline vi to_ints(vf x) {
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23
  return (vi)(x + shift) - 0x4B400000;
}

// x[0] to x[3] as matrices of 4 x 4 lanes, one in every part of four lanes, transposed.
template <class V>
static inline void transpose_quads(V* x) {
  typedef int64_t Pairs __attribute__((vector_size(64)));
  const vi low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const Pairs low2 = {0, 8, 2, 10, 4, 12, 6, 14};
  const V a = __builtin_shuffle(x[0], x[1], low), b = __builtin_shuffle(x[0], x[1], low + 2);
  const V c = __builtin_shuffle(x[2], x[3], low), d = __builtin_shuffle(x[2], x[3], low + 2);
  x[0] = (V)__builtin_shuffle((Pairs)a, (Pairs)c, low2);
  x[1] = (V)__builtin_shuffle((Pairs)a, (Pairs)c, low2 + 1);
  x[2] = (V)__builtin_shuffle((Pairs)b, (Pairs)d, low2);
  x[3] = (V)__builtin_shuffle((Pairs)b, (Pairs)d, low2 + 1);
}

// Parts 0 and 2, or 1 and 3, of a and then of b.
static inline vi even_parts(vi a, vi b) {
  const vi order = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  return __builtin_shuffle(a, b, order);
}
static inline vi odd_parts(vi a, vi b) {
  const vi order = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  return __builtin_shuffle(a, b, order);
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
