// SPDX-License-Identifier: Apache-2.0
// Attention over tokens that are read as they were, not from codes: a request's new tokens in
// prefill mode `raw`, and copies of its first and newest cached tokens.
#pragma once

#include "cpu/job.h"

namespace fq::FQ_ISA {

// The row of copy_key that holds the cached token at `position`, -1 when there is none.
static inline int copy_row(const Call& call, int req, int position) {
  const FqAttend& a = call.args;
  const int recent = position - context_len(call, req) + num_recent(a);
  if (position >= a.num_first && recent < 0) return -1;
  const int column = position < a.num_first ? position : a.num_first + recent;
  return a.batch->copy_table[req * (int64_t)(a.num_first + num_recent(a)) + column];
}

// Hides the tokens [t0, t0 + count) of a tile that are read from copies. Returns how many.
static inline int hide_copies(const Call& call, int req, int t0, int count, float* hidden) {
  int num_hidden = 0;
  for (int j = 0; j < kMaxTile; ++j) {
    const bool hide = j < count && copy_row(call, req, t0 + j) >= 0;
    hidden[j] = hide ? kMinusInf : 0.0f;
    num_hidden += hide;
  }
  return num_hidden;
}

// Copies this step's tokens that later steps read without codes, heads of all of them in turn.
static void copy_new(const Call& call, int64_t i) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, heads = call.pages.num_kv_heads;
  const int64_t token = a.batch->new_tokens[i / heads], row = a.batch->new_rows[i / heads],
                head = i % heads;
  const int64_t to = row * a.stride_copy_row + head * a.stride_copy_head;
  alignas(64) float x[kMaxHeadDim];
  const auto copy = [&](const void* raw, int64_t stride_token, int64_t stride_head, void* copies) {
    load_row(raw, token * stride_token + head * stride_head, a.dtype, head_dim, x);
    if (peak(x, head_dim) == __builtin_inff()) memset(x, 0, sizeof(x));
    store_row(copies, to, a.copy_dtype, head_dim, x);
  };
  copy(a.raw_key, a.stride_raw_key_token, a.stride_raw_key_head, a.copy_key);
  copy(a.raw_value, a.stride_raw_value_token, a.stride_raw_value_head, a.copy_value);
}

// Vectors in the model's basis: raw new tokens, or copies of cached ones.
struct Dense {
  const void *key, *value;
  int64_t stride_key_token, stride_key_head, stride_value_token, stride_value_head;
  int dtype;
};

alignas(64) constexpr uint16_t kZeros[kMaxHeadDim] = {};

// A tile of bfloat16 vectors where they lie, each at its own address.
struct BFloatTile {
  static constexpr bool kSpills = false;
  static constexpr int kNumParts = 1;
  const uint16_t* const* rows;
  const uint16_t* word(int t, size_t i) const { return rows[t] + i; }
  vf at(const uint16_t* word, int c) const { return load_bfloats(word + c * kLanes); }
};

// Asks for a token to be in the cache soon.
static inline void prefetch(const Dense& dense, int kv_head, int head_dim, int64_t row) {
  const int64_t size = dense.dtype == kFqFloat32 ? 4 : 2;
  const char* key = static_cast<const char*>(dense.key) +
                    (row * dense.stride_key_token + kv_head * dense.stride_key_head) * size;
  const char* value = static_cast<const char*>(dense.value) +
                      (row * dense.stride_value_token + kv_head * dense.stride_value_head) * size;
  for (int64_t i = 0; i < head_dim * size; i += 64) {
    __builtin_prefetch(key + i);
    __builtin_prefetch(value + i);
  }
}

// Adds tokens at positions [begin, end) to s.raw. Token i of them is row table[i] of `dense`, a
// negative one being left out, or row first_row + i where table is null.
static void attend_dense(const Call& call, const RowBlock& b, const Dense& dense, int begin,
                         int end, const int32_t* table, int64_t first_row, const Scratch& s) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, rows = rows_of(call, b), tile = tile_tokens(head_dim);
  const int first_position = context_len(call, b.req) + b.token;
  for (int t0 = begin; t0 < end; t0 += tile) {
    const int count = end - t0 < tile ? end - t0 : tile, rounded = (count + 7) & ~7;
    const auto row_of = [&](int t) { return table ? table[t - begin] : first_row + t - begin; };
    // The next tile's copies lie scattered: one after the other they would be waited for.
    for (int t = t0 + tile; table && t < t0 + 2 * tile && t < end; ++t) {
      if (row_of(t) >= 0) prefetch(dense, b.kv_head, head_dim, row_of(t));
    }
    int64_t row[kMaxTile];
    bool any = false;
    for (int t = 0; t < tile; ++t) {
      row[t] = t >= count ? -1 : row_of(t0 + t);
      any |= row[t] >= 0;
      s.key_factor[t] = row[t] >= 0 ? a.scale : 0.0f;
      s.value_factor[t] = row[t] >= 0 ? 1.0f : 0.0f;
      s.hidden[t] = t < count && row[t] < 0 ? kMinusInf : 0.0f;
    }
    if (!any) continue;
    // Calls `use` with the tile of vectors at `base`: where they lie if that can be, else as
    // floats.
    const auto with_tile = [&](const void* base, int64_t stride_token, int64_t stride_head,
                               auto use) {
      const int64_t head = b.kv_head * stride_head;
      if (dense.dtype == kFqBFloat16 && rows <= kMaxFusedRows) {
        const uint16_t* vectors[kMaxTile];
        for (int t = 0; t < rounded; ++t) {
          vectors[t] = row[t] < 0
                           ? kZeros
                           : static_cast<const uint16_t*>(base) + row[t] * stride_token + head;
        }
        return use(BFloatTile{vectors});
      }
      for (int t = 0; t < rounded; ++t) {
        float* dst = s.tile + (int64_t)t * head_dim;
        if (row[t] < 0) {
          memset(dst, 0, (size_t)head_dim * 4);
        } else {
          load_row(base, row[t] * stride_token + head, dense.dtype, head_dim, dst);
        }
      }
      use(DenseTile{s.tile, head_dim});
    };
    with_tile(dense.key, dense.stride_key_token, dense.stride_key_head, [&](const auto& keys) {
      dot_tile(s.query_raw, rows, keys, head_dim, rounded, s.scores);
    });
    const Mask mask = {
        t0,      count,  first_position, call.group_size, a.reach, 0, table ? s.hidden : nullptr,
        nullptr, nullptr};
    softmax_tile(s.scores, rows, s.key_factor, s.value_factor, mask, a.soft_cap, s.raw, s.alpha);
    with_tile(dense.value, dense.stride_value_token, dense.stride_value_head,
              [&](const auto& values) {
                axpy_tile(s.scores, s.alpha, rows, values, head_dim, count, s.raw.o);
              });
  }
}

static inline Dense copies_of(const FqAttend& a) {
  return {a.copy_key,        a.copy_value,       a.stride_copy_row, a.stride_copy_head,
          a.stride_copy_row, a.stride_copy_head, a.copy_dtype};
}

// Asks for the copies that attend_raw reads first.
static inline void prefetch_copies(const Call& call, const RowBlock& b) {
  const FqAttend& a = call.args;
  if (!a.batch->copy_table) return;
  const int num_columns = a.num_first + num_recent(a), head_dim = call.codec.head_dim;
  const int32_t* table = a.batch->copy_table + b.req * (int64_t)num_columns;
  for (int i = 0; i < num_columns && i < a.num_first + tile_tokens(head_dim); ++i) {
    if (table[i] >= 0) prefetch(copies_of(a), b.kv_head, head_dim, table[i]);
  }
}

// Attends what the request reads without codes into s.raw: copies of its first and newest cached
// tokens, then its own new tokens.
static void attend_raw(const Call& call, const RowBlock& b, const Scratch& s) {
  const FqAttend& a = call.args;
  const int context = context_len(call, b.req), tile = tile_tokens(call.codec.head_dim);
  const int oldest = b.window_begin;
  clear(s.raw, rows_of(call, b), call.codec.head_dim);
  if (a.batch->copy_table) {
    const Dense copies = copies_of(a);
    const int32_t* table = a.batch->copy_table + b.req * (int64_t)(a.num_first + num_recent(a));
    const int first = a.num_first < context ? a.num_first : context;
    if (oldest < first) attend_dense(call, b, copies, 0, first, table, 0, s);
    int begin = context - num_recent(a) > first ? context - num_recent(a) : first;
    begin = oldest > begin ? oldest : begin;
    attend_dense(call, b, copies, begin, context,
                 table + a.num_first + (begin - (context - num_recent(a))), 0, s);
  }
  const Dense fresh = {a.raw_key,
                       a.raw_value,
                       a.stride_raw_key_token,
                       a.stride_raw_key_head,
                       a.stride_raw_value_token,
                       a.stride_raw_value_head,
                       a.dtype};
  int begin = oldest > context ? (oldest - context) / tile * tile : 0;
  attend_dense(call, b, fresh, context + begin, context + b.token + b.num_tokens, nullptr,
               a.batch->query_start_loc[b.req] + begin, s);
}

}  // namespace fq::FQ_ISA
