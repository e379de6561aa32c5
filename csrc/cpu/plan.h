// SPDX-License-Identifier: Apache-2.0
// The work of one step, cut into jobs: planned once for all layers whose heads and windows are
// alike.
#pragma once

#include "cpu/params.h"
#include "cpu/tile.h"

namespace fq::FQ_ISA {

constexpr int64_t kMinParallelWork = 2048;  // rows times tokens, about 10 us: less is one thread's
constexpr int kMaxRows = 48;  // rows that share a decoded tile; their queries and outputs fit L2

struct RowBlock {
  int32_t req;
  int32_t kv_head;
  int32_t token;         // first new token of the block, counted within the request
  int32_t num_tokens;    // new tokens in the block
  int32_t window_begin;  // oldest position that any row of the block sees
  int32_t first_begin;   // positions [first_begin, first_end) are the leading split, which there
  int32_t first_end;     // is unless they are equal
  int32_t begin, end;    // cached positions attended from codes beside those, [begin, end)
  int32_t num_splits;    // splits that [begin, end) touches, and the leading one
  int64_t partial;       // offset of the stored states of its splits, -1 when one job does all
};

struct Job {
  int32_t block;
  int32_t split_begin, split_end;  // counted from the block's first split
};

// A plan in the caller's memory; row blocks follow it, and then jobs.
struct Plan {
  int64_t num_blocks, num_jobs;
  int64_t partial_floats;  // of the stored states of all blocks that several jobs share
  int64_t is_parallel;     // 0 or 1: whether threads are worth waking

  RowBlock* blocks() { return reinterpret_cast<RowBlock*>(this + 1); }
  const RowBlock* blocks() const { return reinterpret_cast<const RowBlock*>(this + 1); }
  Job* jobs() { return reinterpret_cast<Job*>(blocks() + num_blocks); }
  const Job* jobs() const { return reinterpret_cast<const Job*>(blocks() + num_blocks); }
};

static inline int64_t padded(int64_t floats) { return (floats + 15) & ~int64_t{15}; }

// First new token's position in its sequence.
static inline int context_len(const FqBatch& batch, int req) {
  return batch.seq_lens[req] - (batch.query_start_loc[req + 1] - batch.query_start_loc[req]);
}

// Columns of copy_table that belong to the newest tokens.
static inline int num_recent(const FqAttend& a) { return a.batch->num_copy_columns - a.num_first; }

// Positions below this one are the leading split's.
static inline int64_t num_leading(const FqAttend& a) {
  if (!a.key_map) return a.keep_first;
  return a.key_map->num_coded > 0 ? a.key_map->num_plain : 0;
}

// Lengths that cannot be: more new tokens than tokens (2), more than the block table holds (3), or
// than the map of keys knows positions (4); copies of tokens or in rows that there are not (5).
static int check_lengths(const FqPages& pages, const FqAttend& a) {
  const FqBatch& batch = *a.batch;
  const int32_t* loc = batch.query_start_loc;
  for (int req = 0; req < batch.num_reqs; ++req) {
    const int seq_len = batch.seq_lens[req];
    if (loc[req + 1] < loc[req] || context_len(batch, req) < 0) return 2;
    if (seq_len > batch.stride_block_table * pages.block_size) return 3;
    if (a.key_map && a.key_map->turn_fine && seq_len > a.key_map->num_positions) return 4;
  }
  for (int64_t i = 0; i < batch.num_new; ++i) {
    if (batch.new_tokens[i] < 0 || batch.new_tokens[i] >= loc[batch.num_reqs]) return 5;
    if (batch.new_rows[i] < 0 || batch.new_rows[i] >= a.num_copy_rows) return 5;
  }
  return 0;
}

// The row block of `num_tokens` new tokens of a request from its `token`-th on.
static inline RowBlock row_block(const FqAttend& a, int req, int head, int token, int num_tokens) {
  const int context = context_len(*a.batch, req);
  RowBlock b;
  b.req = req;
  b.kv_head = head;
  b.token = token;
  b.num_tokens = num_tokens;
  b.window_begin = first_seen(a.reach, context + token);
  b.begin = b.window_begin;
  b.end = a.raw_key ? context : context + token + num_tokens;
  b.first_end = (int)(num_leading(a) < b.end ? num_leading(a) : b.end);
  b.first_begin = a.keep_first > 0 ? 0 : b.begin < b.first_end ? b.begin : b.first_end;
  if (b.begin < b.first_end) b.begin = b.first_end;
  b.num_splits = b.end > b.begin ? (b.end - 1) / kSplit - b.begin / kSplit + 1 : 0;
  b.num_splits += b.first_end > b.first_begin;
  b.partial = -1;
  return b;
}

// Calls f with every row block of a batch.
template <class F>
static inline void for_each_block(const FqPages& pages, const FqAttend& a, F f) {
  const int group_size = a.num_q_heads / pages.num_kv_heads;
  const int per_block = kMaxRows / group_size > 1 ? kMaxRows / group_size : 1;
  for (int req = a.batch->num_reqs - 1; req >= 0; --req) {
    const int query_len = a.batch->query_start_loc[req + 1] - a.batch->query_start_loc[req];
    if (query_len == 0) continue;
    // The last tokens of a request see the most: they go first, for an even finish.
    for (int token = (query_len - 1) / per_block * per_block; token >= 0; token -= per_block) {
      const int num_tokens = query_len - token < per_block ? query_len - token : per_block;
      for (int head = 0; head < pages.num_kv_heads; ++head) {
        f(row_block(a, req, head, token, num_tokens));
      }
    }
  }
}

// Plans args.batch into `out`, or with null says how many bytes that takes at most. Returns bytes,
// or minus check_lengths' error. What a plan depends on beside the batch: head_dim, num_kv_heads
// and block_size, and of args num_q_heads, reach, keep_first, num_threads, num_copy_rows, whether
// raw_key is null, and the numbers of key_map.
static int64_t plan_attention(const FqCodec& codec, const FqPages& pages, const FqAttend& args,
                              void* out) {
  if (const int error = check_lengths(pages, args)) return -error;
  int64_t num_blocks = 0, total_splits = 0, work = 0, most_jobs = 0;
  const int group_size = args.num_q_heads / pages.num_kv_heads;
  for_each_block(pages, args, [&](const RowBlock& b) {
    ++num_blocks;
    total_splits += b.num_splits;
    most_jobs += b.num_splits > 1 ? b.num_splits : 1;
    work += (int64_t)b.num_tokens * group_size * (b.end - b.begin);
  });
  const int64_t bytes =
      (int64_t)(sizeof(Plan) + num_blocks * sizeof(RowBlock) + most_jobs * sizeof(Job));
  if (!out) return bytes;

  // Jobs: whole row blocks, unless that leaves threads idle; then ranges of their splits.
  int64_t per_job = total_splits / (4 * (int64_t)args.num_threads);
  if (args.num_threads == 1) per_job = total_splits;
  per_job = per_job > 1 ? per_job : 1;
  Plan& plan = *static_cast<Plan*>(out);
  plan = {num_blocks, 0, 0, work >= kMinParallelWork || args.raw_key};
  RowBlock* block = plan.blocks();
  Job* jobs = plan.jobs();
  for_each_block(pages, args, [&](RowBlock b) {
    const bool is_shared = b.num_splits > per_job;
    if (is_shared) {
      b.partial = plan.partial_floats;
      const int64_t floats = state_floats(b.num_tokens * group_size, codec.head_dim);
      plan.partial_floats += padded(b.num_splits * floats);
    }
    const int step = is_shared ? (int)per_job : b.num_splits;
    int begin = 0;
    do {
      const int end = begin + step < b.num_splits ? begin + step : b.num_splits;
      jobs[plan.num_jobs++] = {(int32_t)(block - plan.blocks()), begin, end};
      begin = end;
    } while (begin < b.num_splits);
    *block++ = b;
  });
  return bytes;
}

}  // namespace fq::FQ_ISA
