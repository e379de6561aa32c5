// SPDX-License-Identifier: Apache-2.0
// Vectors that are encoded together, and their scratch.
#pragma once

#include "cpu/codec.h"
#include "cpu/workspace.h"

namespace fq::FQ_ISA {

// Few enough to stay in the L1 cache; but many where codewords are in lists, each of which is then
// read once for all that search it, as long as their floats stay in the L2 cache.
constexpr int kMaxBatch = 1024, kMaxListedFloats = 1 << 16, kMaxFloats = 1 << 12;

struct Batch {
  int count;
  int64_t token[kMaxBatch];
  int head[kMaxBatch];
  uint8_t* record[kMaxBatch];
  uint16_t norm[2][kMaxBatch];  // of keys, of values
  Magnitude size[kMaxBatch];
  // Scratch, [count, head_dim] each.
  float *x, *y, *run, *decoded;
  uint32_t *index, *patterns;
  float* parts;  // [count, 2, 16], of sums
};

// For `most` vectors.
static inline void set_scratch(Batch& b, int head_dim, int most) {
  const int64_t floats = (int64_t)most * head_dim;
  float* p = static_cast<float*>(thread_scratch((size_t)floats * 24 + (size_t)most * 128));
  b.x = p;
  b.y = p + floats;
  b.run = p + 2 * floats;
  b.decoded = p + 3 * floats;
  b.index = reinterpret_cast<uint32_t*>(p + 4 * floats);
  b.patterns = b.index + floats;
  b.parts = p + 6 * floats;
}

}  // namespace fq::FQ_ISA
