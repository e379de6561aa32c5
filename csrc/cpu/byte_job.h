// SPDX-License-Identifier: Apache-2.0
// Which calls are attended with dot products of bytes, and the scratch of that (byte_attention.h).
#pragma once

#include "cpu/byte_codes.h"
#include "cpu/tile.h"

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

constexpr int kMaxByteDim = 256;
constexpr int kChunkGroups = 4;  // groups of tokens decoded at once
constexpr int kChunkTokens = kChunkGroups * kGroup;
constexpr int kMaxVectors = kMaxByteDim / 4 + 16;  // of a kind, of a group of keys

// Subvectors of one code in a key.
struct ByteRun {
  const FqCode* code;
  ByteKernels kernels;
  int num_subvecs;
  int first;   // coordinate
  int offset;  // byte of a key's indices
  int high;    // number of the first vector of high planes; low ones have the same numbers
};

// What keys consist of. Runs with low planes come first.
struct ByteKeys {
  int num_runs;  // 0: the call is attended in floats
  int dim;       // of queries
  int num_high, num_low;
  ByteRun runs[3];
};

struct ByteScratch {
  uint8_t* digits;       // [rows, 2, kMaxVectors, 4] of queries: high ones, then low ones
  int32_t* digit_start;  // [rows, 2], what sums of products with high and low digits begin with
  float* digit_half;     // [rows], what is missing in the result
  float* digit_scale;    // [rows], its unit
  float* scores;         // [rows, kSplit]
  uint8_t* weights;      // [rows, 2, kSplit]: high digits, then low ones
  float* weight_scale;   // [rows]
  float* weight_half;    // [rows], half the sum of a row's digits, if the code of values is folded
  int32_t* sums;         // [rows, num_sums, columns, 16]
  float* key_factor;     // [kSplit]
  float* value_factor;   // [kSplit]
  float* hidden;         // [kSplit]
  float* biases;         // [rows, kSplit]
  uint8_t* tile;         // a chunk of keys or of values
  uint8_t* records;      // [kChunkTokens, record_bytes], of groups that are not consecutive
};

constexpr int kDigitStride = 8 * kMaxVectors;

// Sums of values by weights: of products of high bytes, of a high and a low one, of low bytes. The
// last one's terms are small, but may all have one sign.
constexpr int num_sums(bool has_two_bytes) { return has_two_bytes ? 3 : 2; }

// `take(n)` hands out n floats, 64-byte aligned.
template <class Take>
static inline ByteScratch divide_byte_scratch(int rows, int head_dim, int record_bytes,
                                              const Take& take) {
  const auto take_bytes = [&](int64_t n) {
    return reinterpret_cast<uint8_t*>(take(ceil_div((int)n, 4)));
  };
  const auto take_ints = [&](int64_t n) { return reinterpret_cast<int32_t*>(take(n)); };
  const int columns = head_dim / 16 + 8;  // of a kind; the last subvectors may be nobody's
  const int key_bytes = kChunkGroups * 2 * (head_dim / 4 + 16) * 64;
  const int value_bytes = kChunkTokens / 4 * 2 * columns * 64;
  ByteScratch s;
  s.digits = take_bytes((int64_t)rows * kDigitStride + 64);  // written 64 bytes at a time
  s.digit_start = take_ints(2 * (int64_t)rows);
  s.digit_half = take(rows);
  s.digit_scale = take(rows);
  s.scores = take((int64_t)rows * kSplit);
  s.weights = take_bytes((int64_t)rows * 2 * kSplit);
  s.weight_scale = take(rows);
  s.weight_half = take(rows);
  s.sums = take_ints((int64_t)rows * num_sums(true) * columns * 16);
  s.key_factor = take(kSplit);
  s.value_factor = take(kSplit);
  s.hidden = take(kSplit);
  s.biases = take((int64_t)rows * kSplit);
  s.tile = take_bytes(key_bytes > value_bytes ? key_bytes : value_bytes);
  s.records = take_bytes((int64_t)kChunkTokens * record_bytes);
  return s;
}

static inline void add_run(ByteKeys* keys, const FqCode& code, int num_subvecs) {
  if (num_subvecs == 0) return;
  ByteRun run = {&code, byte_kernels(code), num_subvecs, 0, 0, keys->num_high};
  if (keys->num_runs > 0) {
    const ByteRun& last = keys->runs[keys->num_runs - 1];
    run.first = last.first + last.num_subvecs * last.code->subvec_dim;
    run.offset = last.offset + last.num_subvecs;
  }
  const int num_vectors = ceil_div(num_subvecs, 4) * code.subvec_dim;
  keys->num_high += num_vectors;
  if (code.subvec_dim == 2) keys->num_low += num_vectors;
  keys->runs[keys->num_runs++] = run;
}

// The keys of calls for models in `dtype`; num_runs is 0 where these or their values have no bytes.
static inline ByteKeys byte_keys(const FqCodec& codec, const FqKeyMap* map, int dtype) {
  ByteKeys keys = {};
  if (dtype == kFqFloat32 || codec.head_dim > kMaxByteDim || !codec.value.planes) return keys;
  // Long sums of transformed keys leave float16's outputs too little room.
  if (dtype == kFqFloat16 && map && map->num_coded > 128) return keys;
  keys.dim = codec.head_dim;
  if (map && map->num_coded > 0) {
    keys.dim = map->num_coded;
    for (const FqCode& code : map->codes) {
      if (!code.planes) return keys;
    }
    for (int i = 0; i < 3; ++i) add_run(&keys, map->codes[i], map->num_subvecs[i]);
  } else if (codec.key.planes) {
    add_run(&keys, codec.key, codec.head_dim / codec.key.subvec_dim);
  }
  return keys;
}

}  // namespace fq::FQ_ISA

#else

namespace fq::FQ_ISA {

struct ByteScratch {};

// Without these instructions every call is attended in floats.
struct ByteKeys {
  static constexpr int num_runs = 0;
};

static inline ByteKeys byte_keys(const FqCodec&, const FqKeyMap*, int) { return {}; }

template <class Take>
static inline ByteScratch divide_byte_scratch(int, int, int, const Take&) {
  return {};
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
