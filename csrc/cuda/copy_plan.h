// SPDX-License-Identifier: Apache-2.0
// Which tokens have copies, planned once a step for all layers of a group: the rule of
// vllm_fibquant/engine/device_pool.py. Their oracle is in tests/engine/test_device_pool.py.
//
// Three launches, so that none reads what another thread of it writes: slots that are written lose
// their copies and tokens say which row they want; the last of those that want a row takes it; the
// table is looked up. A thread owns a token, or an entry of the table.
#pragma once

#include "cuda/params.h"
#include "cuda/request.h"
#include "cuda/warp.h"

namespace fq {

constexpr int kPlanThreads = 256, kCopyUnit = 16;  // slots that keep together
constexpr uint32_t kGolden = 2654435769u;          // 2^32 over the golden ratio

// Rows of a slot: among those of first tokens, and among the others.
struct CopyRows {
  int64_t first, recent;

  FQ_DEVICE static CopyRows of(const FqCudaPlan& a, int64_t slot) {
    const uint64_t mixed = (uint32_t)(slot / kCopyUnit) * kGolden;
    const int within = (int)(slot % kCopyUnit);
    CopyRows rows;
    rows.first = (int64_t)(mixed * a.first_units >> 32) * a.num_first + within;
    rows.recent = (int64_t)(mixed * a.recent_units >> 32) * kCopyUnit + within +
                  (int64_t)a.first_units * a.num_first;
    return rows;
  }
};

FQ_DEVICE int64_t plan_index() { return (int64_t)cta_idx().x * num_threads() + thread_idx(); }

FQ_DEVICE void drop_copy(const FqCudaPlan& a, int64_t row, int64_t slot) {
  if (a.tags[row] == slot) a.tags[row] = -1;  // no other token has this slot
}

FQ_KERNEL(kPlanThreads, 1) want_rows(FQ_PARAM FqCudaPlan a) {
  const int64_t token = plan_index();
  if (token >= a.num_tokens) return;
  const int64_t slot = a.slots[token];
  a.wanted[token] = -1;
  if (slot < 0) return;
  const CopyRows rows = CopyRows::of(a, slot);
  drop_copy(a, rows.first, slot);
  drop_copy(a, rows.recent, slot);
  const int req = request_of(a, token), seq_len = a.seq_lens[req];
  const int64_t position = token - a.query_start_loc[req + 1] + seq_len;
  const bool is_first = position < a.num_first;
  if (!is_first && position < seq_len - a.num_recent) return;
  if ((is_first ? a.first_units : a.recent_units) == 0) return;
  a.wanted[token] = (int32_t)(is_first ? rows.first : rows.recent);
}

FQ_KERNEL(kPlanThreads, 1) take_rows(FQ_PARAM FqCudaPlan a) {
  const int64_t token = plan_index();
  if (token >= a.num_tokens) return;
  int32_t row = a.wanted[token];
  for (int64_t later = token + 1; row >= 0 && later < a.num_tokens; ++later) {
    if (a.wanted[later] == row) row = -1;
  }
  a.rows[token] = row;
  if (row >= 0) a.tags[row] = a.slots[token];
}

FQ_KERNEL(kPlanThreads, 1) look_up_copies(FQ_PARAM FqCudaPlan a) {
  const int columns = a.num_first + a.num_recent;
  const int64_t entry = plan_index();
  if (entry >= (int64_t)a.num_reqs * columns) return;
  const int req = (int)(entry / columns), column = (int)(entry % columns);
  const int num_new = a.query_start_loc[req + 1] - a.query_start_loc[req];
  const int64_t context = a.seq_lens[req] - num_new;
  const bool is_first = column < a.num_first;
  const int64_t position = is_first ? column : context - columns + column;
  a.table[entry] = -1;
  // A recent token that is also a first one counts once.
  if (position < (is_first ? 0 : a.num_first) || position >= context) return;
  if ((is_first ? a.first_units : a.recent_units) == 0) return;
  const int64_t place = position / a.block_size;
  if (place >= a.table_width) return;
  const int64_t block = a.block_table[req * a.stride_block_table + place];
  const int64_t slot = block * a.block_size + position % a.block_size;
  if (slot < 0) return;
  const CopyRows rows = CopyRows::of(a, slot);
  const int64_t row = is_first ? rows.first : rows.recent;
  if (a.tags[row] == slot) a.table[entry] = (int32_t)row;
}

}  // namespace fq
