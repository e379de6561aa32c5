// SPDX-License-Identifier: Apache-2.0
// What a thread of paged attention works with: the call, its scratch, and queries loaded into it.
#pragma once

#include "cpu/byte_job.h"
#include "cpu/codec.h"
#include "cpu/mapped.h"
#include "cpu/params.h"
#include "cpu/plan.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"
#include "page_layout.h"

namespace fq::FQ_ISA {

constexpr int kMaxFirstMeans = 16;

struct Call {
  const FqCodec& codec;
  const FqPages& pages;
  const FqAttend& args;
  RecordLayout layout;
  CodeKernels key, value;
  float* partials;
  int group_size;
  bool bad_block;  // a block table entry outside the cache was met; written atomically
#if defined(FQ_BYTES)
  ByteKeys byte_keys;
#endif
};

// Scratch of one thread.
struct Scratch {
  float *query, *query_raw, *tile, *scores, *key_factor, *value_factor, *hidden, *alpha, *bias;
  float *turning, *turned, *biases;  // [rows, 2, columns], [4, 2, columns], [rows, kMaxTile]
  float *first_value, *ones;         // [kMaxFirstMeans, head_dim] and [kMaxTile]
  float *first_bias, *first_biases;  // [rows, kMaxFirstMeans] and [rows, kMaxTile]
  State split, total, raw;
#if defined(FQ_BYTES)
  ByteScratch bytes;
#endif
};

// Divides `base`, null to count alone, among a thread's scratch; sets the floats it takes.
static inline Scratch divide_scratch(const Call& call, float* base, int rows, int64_t* total) {
  const int head_dim = call.codec.head_dim;
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
#if defined(FQ_BYTES)
  if (call.byte_keys.num_runs > 0) {
    s.bytes = divide_byte_scratch(rows, head_dim, call.layout.record_bytes, take);
  }
#endif
  return s;
}

static inline Scratch make_scratch(const Call& call, int rows) {
  int64_t total;
  divide_scratch(call, nullptr, rows, &total);
  float* base = static_cast<float*>(thread_scratch((size_t)total * 4));
  const Scratch s = divide_scratch(call, base, rows, &total);
  for (int i = 0; i < kMaxTile; ++i) s.ones[i] = 1.0f;
  return s;
}

static inline int rows_of(const Call& call, const RowBlock& b) {
  return b.num_tokens * call.group_size;
}

// First new token's position in its sequence.
static inline int context_len(const Call& call, int req) {
  return context_len(*call.args.batch, req);
}

// Consecutive records of one page.
struct Run {
  const uint8_t* record;
  int count;
};

static inline Run find_run(Call& call, const RowBlock& b, int position, int end) {
  const FqPages& pages = call.pages;
  const int block_size = pages.block_size;
  const int offset = position % block_size;
  const int64_t block =
      call.args.batch
          ->block_table[b.req * call.args.batch->stride_block_table + position / block_size];
  const int count = end - position < block_size - offset ? end - position : block_size - offset;
  if (block < 0 || block >= pages.num_blocks) {
    __atomic_store_n(&call.bad_block, true, __ATOMIC_RELAXED);
    return {nullptr, count};
  }
  return {pages.base + block * pages.stride_block + b.kv_head * pages.stride_head +
              (int64_t)offset * call.layout.record_bytes,
          count};
}

enum class Queries { kRaw, kCodes, kFirst };  // for raw keys, for codes, for the leading split

// The queries of a row block, [rows, head_dim], rotated unless raw; for codes of transformed keys
// [rows, num_coded], transformed. For codes of mapped keys also s.bias[r], the part of row r's
// scores that all of them have in common, and s.turning.
static void load_queries(const Call& call, const RowBlock& b, Queries which, const Scratch& s,
                         float* dst) {
  const FqAttend& a = call.args;
  const bool first = which == Queries::kFirst;
  const FqKeyMap* map = which == Queries::kCodes ? a.key_map : nullptr;
  const void* query = first ? a.first_query : a.query;
  const int64_t stride_token = first ? a.stride_first_query_token : a.stride_query_token;
  const int64_t stride_head = first ? a.stride_first_query_head : a.stride_query_head;
  const int head_dim = call.codec.head_dim, group = call.group_size;
  const int64_t token = a.batch->query_start_loc[b.req] + b.token;
  const bool transforms = map && map->num_coded > 0;
  float* loaded = transforms ? s.query_raw : dst;
  for (int r = 0; r < rows_of(call, b); ++r) {
    const int head = b.kv_head * group + r % group;
    float* q = loaded + (int64_t)r * head_dim;
    load_row(query, (token + r / group) * stride_token + head * stride_head, a.dtype, head_dim, q);
    if (map) s.bias[r] = a.scale * dot(q, map->mean + (int64_t)b.kv_head * head_dim, head_dim);
    if (map && map->turn_fine) {
      turning_weights(*map, b.kv_head, a.scale, q, s.turning + (int64_t)r * map->num_columns * 2);
    }
    if (!transforms && which != Queries::kRaw) rotate(call.codec, q, false);
  }
  if (transforms) {
    multiply_transposed(matrix_of(*map, map->query_matrix_t, b.kv_head, head_dim), head_dim,
                        map->num_coded, rows_of(call, b), loaded, dst);
  }
}

// What a row block's first tokens have from the map's means of them: s.first_value, rotated, and
// s.first_bias, what those of keys add to each row's scores.
static void load_first_means(const Call& call, const RowBlock& b, const Scratch& s) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, group = call.group_size;
  const int num_means = a.key_map->num_first_means;
  const int64_t at = (int64_t)b.kv_head * num_means * head_dim;
  for (int p = 0; p < num_means; ++p) {
    float* mean = s.first_value + p * head_dim;
    memcpy(mean, a.key_map->first_value + at + p * head_dim, (size_t)head_dim * 4);
    rotate(call.codec, mean, false);
  }
  const int64_t token = a.batch->query_start_loc[b.req] + b.token;
  for (int r = 0; r < rows_of(call, b); ++r) {
    alignas(64) float q[kMaxHeadDim];
    const int head = b.kv_head * group + r % group;
    load_row(a.query, (token + r / group) * a.stride_query_token + head * a.stride_query_head,
             a.dtype, head_dim, q);
    for (int p = 0; p < num_means; ++p) {
      s.first_bias[r * kMaxFirstMeans + p] =
          a.scale * dot(q, a.key_map->first_key + at + p * head_dim, head_dim);
    }
  }
}

}  // namespace fq::FQ_ISA
