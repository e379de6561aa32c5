// SPDX-License-Identifier: Apache-2.0
// Rates that the attention kernels are built on, in warp instructions per clock and multiprocessor:
// gathers from a bank-replicated table, byte permutations, tensor core products. Loaded by
// benchmarks/gpu_rates.py.
#include <cstdint>

#include "cuda/warp.h"

namespace {

using namespace fq;

constexpr int kThreads = 512, kTable = 64 << 10, kUnroll = 16;
enum Op { kGather4, kGather8, kGather16, kConflicts, kPermute, kHmma, kImma };

// One CTA per multiprocessor. cycles[cta] is from the first to the last warp.
template <int kOp>
__global__ void __launch_bounds__(kThreads, 1)
    measure(int rounds, long long* cycles, uint32_t* out) {
  extern __shared__ __align__(128) uint8_t table[];
  for (int i = threadIdx.x; i < kTable / 4; i += kThreads)
    reinterpret_cast<uint32_t*>(table)[i] = i * 2654435761u;
  uint32_t words[4], sum = 0;
  for (int i = 0; i < 4; ++i) words[i] = (threadIdx.x + 32 * i + 1) * 2246822519u;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t copy = kOp == kGather4   ? lane * 4
                        : kOp == kGather8 ? lane % 16 * 8
                                          : lane % 8 * 16;
  float acc[8][4] = {};
  int32_t integers[8][4] = {};
  __syncthreads();
  const long long begin = clock64();
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if constexpr (kOp <= kConflicts) {  // rows by the bytes of a word, as in codes.h
        // kConflicts: 256 rows of 8 bytes one after another, no copies.
        const uint32_t at = kOp == kConflicts
                                ? (words[i / 4] >> i % 4 * 8 & 255) * 8
                                : __byte_perm(words[i / 4], copy, 0x5504 | i % 4 << 4);
        if (kOp == kGather4) sum ^= load_as<uint32_t>(table + at);
        if (kOp == kGather8 || kOp == kConflicts) {
          const Pair x = load_pair(table + at);
          sum ^= x.x ^ x.y;
        }
        if (kOp == kGather16) {
          const Quad x = load_quad(table + at);
          sum ^= x.x ^ x.y ^ x.z ^ x.w;
        }
      } else if constexpr (kOp == kPermute) {
        words[i % 4] = __byte_perm(words[i % 4], words[(i + 1) % 4], 0x6153);
      } else if constexpr (kOp == kHmma) {
        mma(acc[i % 8], words[0], words[1], words[2], words[3], words[0], words[1]);
      } else {
        int32_t (&c)[4] = integers[i % 8];
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(words[0]),
              "r"(words[1]));
      }
    }
    if (kOp <= kConflicts) {
      for (int i = 0; i < 4; ++i) words[i] += 0x9E3779B9u;
    }
  }
  __shared__ unsigned long long first, last;
  if (threadIdx.x == 0) first = ~0ull, last = 0;
  __syncthreads();
  const long long end = clock64();
  atomicMin(&first, (unsigned long long)begin);
  atomicMax(&last, (unsigned long long)end);
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = last - first;
  for (int i = 0; i < 8; ++i) {
    for (int c = 0; c < 4; ++c) sum += integers[i][c] + __float_as_uint(acc[i][c]);
  }
  for (int i = 0; i < 4; ++i) sum ^= words[i];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;  // nothing is optimised away
}

__global__ void read_all(const uint4* x, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x) {
    const uint4 v = x[i];
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678) out[0] = sum;
}

}  // namespace

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

// Launches the measurement of an Op: every warp of a CTA does 16 * rounds of it. Returns 0 or a
// cudaError_t.
FQ_EXPORT int fq_rate(int op, int rounds, int ctas, long long* cycles, uint32_t* out) {
  void (*const kernels[])(int, long long*, uint32_t*) = {
      measure<kGather4>, measure<kGather8>, measure<kGather16>, measure<kConflicts>,
      measure<kPermute>, measure<kHmma>,    measure<kImma>};
  const int error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernels[op]),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kTable);
  if (error) return error;
  kernels[op]<<<ctas, kThreads, kTable>>>(rounds, cycles, out);
  return cudaGetLastError();
}

// Reads `bytes`, a multiple of 16, once.
FQ_EXPORT int fq_read(const void* x, int64_t bytes, int ctas, uint32_t* out, void* stream) {
  read_all<<<ctas, 512, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(x),
                                                                bytes / 16, out);
  return cudaGetLastError();
}
