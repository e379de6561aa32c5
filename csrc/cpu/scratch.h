// SPDX-License-Identifier: Apache-2.0
// The memory a thread of paged attention works in.
#pragma once

#include "cpu/byte_job.h"
#include "cpu/plan.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"

namespace fq::FQ_ISA {

constexpr int kMaxFirstMeans = 16;

// Scratch of one thread.
struct Scratch {
  float *query, *query_raw, *tile, *scores, *key_factor, *value_factor, *hidden, *alpha, *bias;
  float *turning, *turned, *biases;  // [rows, 2, columns], [4, 2, columns], [rows, kMaxTile]
  float *first_value, *ones;         // [kMaxFirstMeans, head_dim] and [kMaxTile]
  float *first_bias, *first_biases;  // [rows, kMaxFirstMeans] and [rows, kMaxTile]
  State split, total, raw;
  ByteScratch bytes;
};

// Divides `base`, null to count alone, among a thread's scratch for row blocks of at most `rows`;
// sets the floats it takes. With record_bytes other than 0 records are attended with bytes.
static inline Scratch divide_scratch(int head_dim, int rows, int record_bytes, float* base,
                                     int64_t* total) {
  *total = 0;
  const auto take = [&](int64_t floats) {
    float* p = base ? base + *total : nullptr;
    *total += padded(floats);
    return p;
  };
  const int64_t columns = padded(head_dim) + 64;  // of cosines and sines
  Scratch s;
  s.query = take((int64_t)rows * head_dim);
  s.query_raw = take((int64_t)rows * head_dim);
  s.tile = take((int64_t)kMaxTile * head_dim);
  s.scores = take(rows * kMaxTile);
  s.key_factor = take(kMaxTile);
  s.value_factor = take(kMaxTile);
  s.hidden = take(kMaxTile);
  s.alpha = take(rows);
  s.bias = take(rows);
  s.turning = take(rows * columns);
  s.turned = take(4 * columns);
  s.biases = take(rows * kMaxTile);
  s.first_bias = take(rows * kMaxFirstMeans);
  s.first_biases = take(rows * kMaxTile);
  s.first_value = take(kMaxFirstMeans * (int64_t)head_dim);
  s.ones = take(kMaxTile);
  const int64_t state = state_floats(rows, head_dim);
  s.split = state_at(take(state), rows, head_dim);
  s.total = state_at(take(state), rows, head_dim);
  s.raw = state_at(take(state), rows, head_dim);
  if (record_bytes > 0) s.bytes = divide_byte_scratch(rows, head_dim, record_bytes, take);
  return s;
}

static inline Scratch make_scratch(int head_dim, int rows, int record_bytes) {
  int64_t total;
  divide_scratch(head_dim, rows, record_bytes, nullptr, &total);
  float* base = static_cast<float*>(thread_scratch((size_t)total * 4));
  const Scratch s = divide_scratch(head_dim, rows, record_bytes, base, &total);
  for (int i = 0; i < kMaxTile; ++i) s.ones[i] = 1.0f;
  return s;
}

}  // namespace fq::FQ_ISA
