// SPDX-License-Identifier: Apache-2.0
// Everything the kernels need that C++ does not have: threads of a CTA, warp collectives, tensor
// core products, asynchronous copies. Two implementations of one interface: PTX here, for nvcc, and
// the emulator (emulate.h), which runs the same kernels on a CPU, for tests.
//
// Fragments of mma m16n8k16, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A [16, 16]  a0 (row g, k 2t 2t+1)  a1 (row g+8, k 2t 2t+1)  a2 (row g, k 2t+8 2t+9)  a3 (g+8,
//   ..) B [16, 8]   b0 (k 2t 2t+1, column g)  b1 (k 2t+8 2t+9, column g) C [16, 8]   c0 c1 (row g,
//   columns 2t 2t+1)  c2 c3 (row g+8, columns 2t 2t+1)
// A register of A and B holds two float16, the lower k in the lower half.
#pragma once

#include <cstdint>
#include <cstring>

namespace fq {

struct Dim3 {
  int x, y, z;
};
struct Pair {
  uint32_t x, y;
};
struct Quad {
  uint32_t x, y, z, w;
};

}  // namespace fq

#ifdef __CUDACC__

#define FQ_DEVICE __device__ __forceinline__
#define FQ_BOTH __host__ __device__ inline
#define FQ_KERNEL(threads, ctas) __global__ __launch_bounds__(threads, ctas) void
#define FQ_PARAM const __grid_constant__

namespace fq {

FQ_DEVICE int thread_idx() { return threadIdx.x; }
FQ_DEVICE int num_threads() { return blockDim.x; }
FQ_DEVICE Dim3 cta_idx() { return {(int)blockIdx.x, (int)blockIdx.y, (int)blockIdx.z}; }
FQ_DEVICE Dim3 num_ctas() { return {(int)gridDim.x, (int)gridDim.y, (int)gridDim.z}; }
FQ_DEVICE void sync_cta() { __syncthreads(); }
FQ_DEVICE void sync_warp() { __syncwarp(); }
FQ_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t memory[];
  return memory;
}

FQ_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FQ_DEVICE bool any(bool x) { return __any_sync(~0u, x); }

// c += a b.
FQ_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of float16: lane 4 g + t holds (row g, columns 2t 2t+1).
FQ_DEVICE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

FQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// The lower word of (high:low) >> shift, shift from 0 to 31.
FQ_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// Numbers below the least normal one count as 0 in these two, which saves three instructions.
FQ_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FQ_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FQ_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
FQ_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }  // the other one if one is NaN
FQ_DEVICE float minimum(float a, float b) { return fminf(a, b); }
FQ_DEVICE float absolute(float x) { return fabsf(x); }

// Two floats to float16, to nearest even.
FQ_DEVICE uint32_t to_half2(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FQ_DEVICE float from_half(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// Copies 16 bytes to shared memory; there once wait_copies has let its group pass.
FQ_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
FQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

FQ_DEVICE void atomic_add(int32_t* p, int32_t x) { atomicAdd(p, x); }

// x, of which nothing is computed ahead of here: what is needed rarely takes no register elsewhere.
FQ_DEVICE int only_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
FQ_DEVICE T load_as(const void* p) {
  return *reinterpret_cast<const T*>(p);
}
FQ_DEVICE Pair load_pair(const void* p) {
  const uint2 v = load_as<uint2>(p);
  return {v.x, v.y};
}
FQ_DEVICE Quad load_quad(const void* p) {
  const uint4 v = load_as<uint4>(p);
  return {v.x, v.y, v.z, v.w};
}
FQ_DEVICE void store_quad(void* p, Quad v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.x, v.y, v.z, v.w);
}
FQ_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
FQ_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

}  // namespace fq

#else
#include "cuda/emulate.h"
#endif

namespace fq {

constexpr int kWarp = 32;
constexpr float kMinNormal = 1.17549435e-38f;

FQ_DEVICE int lane_idx() { return thread_idx() % kWarp; }
FQ_DEVICE int warp_idx() { return thread_idx() / kWarp; }

FQ_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
FQ_DEVICE float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = maximum(x, shuffle_xor(x, mask));
  return x;
}

// Neighbouring floats, aligned to the most that their number allows up to 16 bytes.
template <int kCount>
FQ_DEVICE void load_floats(const float* from, float (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Quad x = load_quad(from + i);
      to[i] = bits_to_float(x.x);
      to[i + 1] = bits_to_float(x.y);
      to[i + 2] = bits_to_float(x.z);
      to[i + 3] = bits_to_float(x.w);
    }
  } else if constexpr (kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const Pair x = load_pair(from + i);
      to[i] = bits_to_float(x.x);
      to[i + 1] = bits_to_float(x.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// Element `at` of an array of FqDtype.
FQ_DEVICE float load_element(const void* base, int64_t at, int32_t dtype) {
  if (dtype == 0) return static_cast<const float*>(base)[at];
  const uint16_t x = static_cast<const uint16_t*>(base)[at];
  return dtype == 1 ? bits_to_float((uint32_t)x << 16) : from_half(x);
}
FQ_DEVICE void store_element(void* base, int64_t at, int32_t dtype, float x) {
  if (dtype == 0) {
    static_cast<float*>(base)[at] = x;
  } else if (dtype == 1) {  // to nearest even; NaN keeps a bit below the exponent
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    static_cast<uint16_t*>(base)[at] = (uint16_t)(x == x ? rounded : 0x7FC0);
  } else {
    static_cast<uint16_t*>(base)[at] = (uint16_t)to_half2(x, 0.0f);
  }
}

}  // namespace fq
