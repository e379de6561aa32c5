// SPDX-License-Identifier: Apache-2.0
// What a thread of paged attention works with: the call, a row block's records, and its queries.
#pragma once

#include "cpu/codec.h"
#include "cpu/mapped.h"
#include "cpu/params.h"
#include "cpu/scratch.h"

namespace fq::FQ_ISA {

struct Call {
  const FqCodec& codec;
  const FqPages& pages;
  const FqAttend& args;
  RecordLayout layout;
  CodeKernels key, value;
  float* partials;
  int group_size;
  bool bad_block;  // a block table entry outside the cache was met; written atomically
  ByteKeys byte_keys;
};

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

}  // namespace fq::FQ_ISA
