// SPDX-License-Identifier: Apache-2.0
// One vector of floats, 4, 8 or 16 lanes wide, and what the kernels do with it. The kernels are
// written once against this header and compiled once per instruction set.
//
// Everything lives in a namespace named after the instruction set, and nothing here instantiates
// templates of the standard library: the linker would merge such instances across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fq::FQ_ISA {

// FQ_LANES, for tests, sets the width of the portable code: 16 runs AVX-512's blocking anywhere.
#if defined(FQ_LANES)
constexpr int kLanes = FQ_LANES;
#elif defined(__AVX512F__)
#define FQ_AVX512
constexpr int kLanes = 16;
#elif defined(__AVX2__)
#define FQ_AVX2
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16)));
typedef float v4_any __attribute__((vector_size(16), aligned(4), may_alias));
typedef float v8_any __attribute__((vector_size(32), aligned(4), may_alias));

constexpr float kMinusInf = -__builtin_inff();

static inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
static inline vf splat(float x) {
#if defined(FQ_AVX512)
  return _mm512_set1_ps(x);
#elif defined(FQ_AVX2)
  return _mm256_set1_ps(x);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

// kLanes / 4 quads side by side.
static inline vf join(const v4* quad) {
#if defined(FQ_AVX512)
  __m512 x = _mm512_castps128_ps512(quad[0]);
  x = _mm512_insertf32x4(x, quad[1], 1);
  x = _mm512_insertf32x4(x, quad[2], 2);
  return _mm512_insertf32x4(x, quad[3], 3);
#elif defined(FQ_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(quad[0]), quad[1], 1);
#else
  vf x;
  memcpy(&x, quad, sizeof(x));
  return x;
#endif
}

// a * b + c, fused where the instruction set can.
static inline vf madd(vf a, vf b, vf c) {
#if defined(FQ_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(FQ_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// x, loaded once: compilers read an operand from memory again for every instruction, and loads are
// what loops over tables run out of first.
static inline vf in_register(vf x) {
#if defined(FQ_AVX512)
  asm("" : "+v"(x));
#elif defined(FQ_AVX2)
  asm("" : "+x"(x));
#endif
  return x;
}

static inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Bit i is lane i of a comparison's result.
static inline uint32_t lane_bits(vi mask) {
#if defined(FQ_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(FQ_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(mask[i] != 0) << i;
  return bits;
#endif
}

static inline vf vabs(vf x) { return (vf)((vi)x & INT32_MAX); }

static inline vf vmax(vf a, vf b) {
#if defined(FQ_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(FQ_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

static inline float fmax2(float a, float b) { return a > b ? a : b; }

// Sums of four vectors, each in the same fixed order: pairs within 16-byte lanes, then lanes.
static inline v4 sum4(vf a, vf b, vf c, vf d) {
#if defined(FQ_AVX512)
  const __m512 t0 = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  const __m512 t1 = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xDD));
  const __m512 t = _mm512_add_ps(_mm512_shuffle_ps(t0, t1, 0x88), _mm512_shuffle_ps(t0, t1, 0xDD));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(FQ_AVX2)
  const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#else
  const vf all[4] = {a, b, c, d};
  v4 out;
  for (int i = 0; i < 4; ++i) {
    float quad[kLanes / 4];
    for (int j = 0; j < kLanes / 4; ++j) {
      const vf& x = all[i];
      quad[j] = (x[4 * j] + x[4 * j + 1]) + (x[4 * j + 2] + x[4 * j + 3]);
    }
    for (int n = kLanes / 8; n > 0; n /= 2) {
      for (int j = 0; j < n; ++j) quad[j] += quad[j + n];
    }
    out[i] = quad[0];
  }
  return out;
#endif
}

static inline float sum(vf a) { return sum4(a, vf{}, vf{}, vf{})[0]; }

// Of `count` floats, a multiple of kLanes.
static inline float dot(const float* a, const float* b, int count) {
  vf acc = vf{};
  for (int i = 0; i < count; i += kLanes) acc = madd(load(a + i), load(b + i), acc);
  return sum(acc);
}

static inline void subtract(float* x, const float* y, int count) {
  for (int i = 0; i < count; i += kLanes) store(x + i, load(x + i) - load(y + i));
}

static inline float max_lane(vf a) {
#if defined(FQ_AVX512)
  return _mm512_reduce_max_ps(a);
#elif defined(FQ_AVX2)
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
  float best = a[0];
  for (int i = 1; i < kLanes; ++i) best = fmax2(best, a[i]);
  return best;
#endif
}

// e^x for x <= 88; exactly 1 at 0, exactly 0 below -87 and at -inf. Relative error below 2e-7
// (range reduction by log 2 and the degree-5 polynomial of Cephes' expf).
static inline vf vexp(vf x) {
  const vi tiny = x < -87.0f;
  x = select(tiny, vf{}, x);
  const vf shift = splat(12582912.0f);  // 1.5 * 2^23 rounds to the nearest integer when added
  const vf n = madd(x, splat(1.44269504088896341f), shift) - shift;
  vf r = madd(n, splat(-0.693359375f), x);
  r = madd(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = madd(p, r, splat(1.3981999507e-3f));
  p = madd(p, r, splat(8.3334519073e-3f));
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  p = madd(p, r * r, r + 1.0f);
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return select(tiny, vf{}, p * (vf)exponent);
}

static inline float exp1(float x) { return vexp(splat(x))[0]; }

// tanh(x) = 1 - 2 / (e^2x + 1)
static inline vf vtanh(vf x) {
  const vf two_x = vmax(x + x, splat(-40.0f));
  const vf bounded = two_x > 40.0f ? splat(40.0f) : two_x;
  return 1.0f - 2.0f / (vexp(bounded) + 1.0f);
}

// Scalars of 16 bits. float16 rounds to nearest even and saturates at 65504.
static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  uint32_t bits;
  if (magnitude >= 0x7C00) {
    bits = 0x7F800000u | (magnitude << 13);
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    const float value = (float)magnitude * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

static inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000u) return sign | 0x7E00;
  if (bits >= 0x47800000u) return sign | 0x7C00;
  if (bits < 0x38800000u) {  // subnormal: let the float adder round
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t shifted;
    memcpy(&shifted, &magnitude, 4);
    return sign | (uint16_t)(shifted - 0x3F000000u);
  }
  bits += 0xC8000FFFu + ((bits >> 13) & 1);
  return sign | (uint16_t)(bits >> 13);
#endif
}

static inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = (uint32_t)b << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline vf load_bfloats(const uint16_t* src) {
  typedef uint16_t bits __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  return (vf)(__builtin_convertvector(*reinterpret_cast<const bits*>(src), vi) << 16);
}

// Loads `count` elements of a model's dtype (FqDtype) as floats, and stores floats as that dtype.
static inline void load_row(const void* base, int64_t offset, int32_t dtype, int count,
                            float* dst) {
  if (dtype == kFqFloat32) {
    memcpy(dst, static_cast<const float*>(base) + offset, (size_t)count * 4);
  } else if (dtype == kFqBFloat16) {
    const uint16_t* src = static_cast<const uint16_t*>(base) + offset;
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(dst + i, load_bfloats(src + i));
    for (; i < count; ++i) dst[i] = bfloat_to_float(src[i]);
  } else {
    const uint16_t* src = static_cast<const uint16_t*>(base) + offset;
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < count; ++i) dst[i] = half_to_float(src[i]);
  }
}

static inline void store_row(void* base, int64_t offset, int32_t dtype, int count,
                             const float* src) {
  if (dtype == kFqFloat32) {
    memcpy(static_cast<float*>(base) + offset, src, (size_t)count * 4);
  } else if (dtype == kFqBFloat16) {
    uint16_t* dst = static_cast<uint16_t*>(base) + offset;
    for (int i = 0; i < count; ++i) dst[i] = float_to_bfloat(src[i]);
  } else {
    uint16_t* dst = static_cast<uint16_t*>(base) + offset;
    for (int i = 0; i < count; ++i) dst[i] = float_to_half(src[i]);
  }
}

}  // namespace fq::FQ_ISA
