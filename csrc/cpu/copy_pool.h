// SPDX-License-Identifier: Apache-2.0
// Which cached tokens have a copy in 16 bits, and in which rows of a layer's copies new ones go:
// planned once a step for all layers that share block tables. vllm_fibquant/engine/copies.py says
// what is promised.
#pragma once

#include "cpu/params.h"

namespace fq {

// One step of a pool. Rows are a ring in order of their last use: those without a copy first, then
// those read least recently. Number num_rows is the ring's beginning and end.
struct CopyStep {
  const FqCopyPool& pool;
  const FqBatch& batch;

  void unlink(int32_t row) const {
    pool.next[pool.previous[row]] = pool.next[row];
    pool.previous[pool.next[row]] = pool.previous[row];
  }

  void link_behind(int32_t at, int32_t row) const {
    pool.previous[row] = at;
    pool.next[row] = pool.next[at];
    pool.previous[pool.next[at]] = row;
    pool.next[at] = row;
  }

  void use(int32_t row) const {
    unlink(row);
    link_behind(pool.previous[pool.num_rows], row);
  }

  // Forgets the copy of a slot that is written.
  void drop(int64_t slot) const {
    const int32_t row = pool.row_of_slot[slot];
    if (row < 0) return;
    pool.slot_of_row[row] = -1;
    pool.row_of_slot[slot] = -1;
    unlink(row);
    link_behind(pool.num_rows, row);
  }

  // The row of the cached token of a request at a position, -1 for none.
  int32_t look_up(int req, int64_t position) const {
    const int64_t column = position / pool.block_size;
    if (position < 0 || column >= batch.stride_block_table) return -1;
    const int64_t block = batch.block_table[req * batch.stride_block_table + column];
    const int64_t slot = block * pool.block_size + position % pool.block_size;
    return slot >= 0 && slot < pool.num_slots ? pool.row_of_slot[slot] : -1;
  }

  // Fills a request's line of the table. Rows that the next step reads again count as used.
  void read(int req, int32_t* line) const {
    const int num_new = batch.query_start_loc[req + 1] - batch.query_start_loc[req];
    const int64_t context = batch.seq_lens[req] - num_new;
    for (int i = 0; i < pool.num_first + pool.num_recent; ++i) {
      const int recent = i - pool.num_first;
      const int64_t position = recent < 0 ? i : context - pool.num_recent + recent;
      // A recent token that is also a first one counts once.
      const bool exists = position < context && (recent < 0 || position >= pool.num_first);
      line[i] = exists ? look_up(req, position) : -1;
      if (line[i] >= 0 && (recent < 0 || recent >= num_new)) use(line[i]);
    }
  }

  // Calls f with the new tokens that are to be copied.
  template <class F>
  void for_each_wanted(const int64_t* slots, F f) const {
    for (int req = 0; req < batch.num_reqs; ++req) {
      const int64_t end = batch.query_start_loc[req + 1], seq_len = batch.seq_lens[req];
      for (int64_t i = batch.query_start_loc[req]; i < end; ++i) {
        const int64_t position = seq_len - (end - i);
        const bool is_near = position < pool.num_first || position >= seq_len - pool.num_recent;
        if (slots[i] >= 0 && is_near) f(i);
      }
    }
  }
};

// Plans a step: the table [num_reqs, num_first + num_recent] of what is read, and the new tokens
// that are copied with their rows, [num_rows] at most. Returns their number; or minus the number of
// slots that row_of_slot must have, when it has fewer, and does nothing.
static int64_t plan_copies(const FqCopyPool& pool, const FqBatch& batch, const int64_t* slots,
                           int32_t* table, int64_t* tokens, int64_t* rows) {
  const CopyStep step = {pool, batch};
  const int64_t begin = batch.query_start_loc[0], end = batch.query_start_loc[batch.num_reqs];
  int64_t largest = -1;
  for (int64_t i = begin; i < end; ++i) largest = slots[i] > largest ? slots[i] : largest;
  if (largest >= pool.num_slots) return -(largest + 1);
  // First of all: a request may share, in this very step, a block that another one writes.
  for (int64_t i = begin; i < end; ++i) {
    if (slots[i] >= 0) step.drop(slots[i]);
  }
  for (int req = 0; req < batch.num_reqs; ++req) {
    step.read(req, table + req * (int64_t)(pool.num_first + pool.num_recent));
  }
  // The last ones, should there be more new tokens than rows.
  int64_t num_wanted = 0, num_new = 0;
  step.for_each_wanted(slots, [&](int64_t) { ++num_wanted; });
  int64_t skip = num_wanted > pool.num_rows ? num_wanted - pool.num_rows : 0;
  step.for_each_wanted(slots, [&](int64_t token) {
    if (--skip < 0) tokens[num_new++] = token;
  });
  for (int64_t i = 0; i < num_new; ++i) {
    const int32_t row = pool.next[pool.num_rows];
    if (pool.slot_of_row[row] >= 0) pool.row_of_slot[pool.slot_of_row[row]] = -1;
    pool.slot_of_row[row] = slots[tokens[i]];
    pool.row_of_slot[slots[tokens[i]]] = row;
    rows[i] = row;
    step.use(row);
  }
  return num_new;
}

}  // namespace fq
