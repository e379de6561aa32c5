// SPDX-License-Identifier: Apache-2.0
// A call in the C ABI of the CPU library: plain structs, which vllm_fibquant/ops/cpu.py fills.
// Nothing here depends on Python or torch.
#pragma once

#include <cstdint>

#include "cpu/tables.h"

extern "C" {

struct FqEncode {
  const void* key;              // [num_tokens, num_kv_heads, head_dim]
  const void* value;            // [num_tokens, num_kv_heads, head_dim]
  const int64_t* slot_mapping;  // [num_tokens]; -1 = skip
  int64_t num_tokens;
  int64_t stride_key_token, stride_key_head;      // elements
  int64_t stride_value_token, stride_value_head;  // elements
  int32_t dtype;                                  // FqDtype
  int32_t num_threads;
  const FqKeyMap* key_map;   // null = keys are coded as they are
  const int64_t* positions;  // [num_tokens], read with key_map alone
};

// The requests of one step, the same for all layers that share block tables.
struct FqBatch {
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
  const int32_t* block_table;      // [num_reqs, stride_block_table]
  const int32_t* copy_table;       // [num_reqs, num_copy_columns] rows, -1 = none: positions 0 to
                              // FqAttend::num_first - 1, then as many as are left before the new
                              // tokens. Null = no copies are read; they need raw_key
  // Raw tokens that are copied once everything has been attended: token new_tokens[i] into row
  // new_rows[i], vectors that hold a NaN or infinity as zeros.
  const int64_t* new_tokens;   // [num_new]
  const int64_t* new_rows;     // [num_new], distinct
  int64_t stride_block_table;  // elements; also its number of columns
  int64_t num_new;             // 0 without copy_table
  int32_t num_reqs;
  int32_t num_copy_columns;
};

// The rows of copies of all layers that share block tables (copy_pool.h).
struct FqCopyPool {
  int32_t* row_of_slot;  // [num_slots], -1 = none
  int64_t* slot_of_row;  // [num_rows], -1 = none
  int32_t* next;         // [num_rows + 1]
  int32_t* previous;     // [num_rows + 1]
  int64_t num_slots;
  int32_t num_rows;
  int32_t num_first, num_recent;  // tokens of a request that are copied
  int32_t block_size;
};

struct FqAttend {
  const FqBatch* batch;
  const void* plan;       // what fq_plan made of this batch
  const void* query;      // [num_tokens, num_q_heads, head_dim]
  void* out;              // [num_tokens, num_q_heads, head_dim]
  const void* raw_key;    // [num_tokens, num_kv_heads, head_dim] or null
  const void* raw_value;  // [num_tokens, num_kv_heads, head_dim] or null
  const float* sinks;     // [num_q_heads] or null
  int64_t stride_query_token, stride_query_head;
  int64_t stride_out_token, stride_out_head;
  int64_t stride_raw_key_token, stride_raw_key_head;
  int64_t stride_raw_value_token, stride_raw_value_head;
  int32_t num_q_heads;
  int32_t dtype;  // FqDtype of query, out, raw_key and raw_value
  int32_t reach;  // n > 0: a query sees the newest n, a window; n < 0: its chunk of -n; 0: all
  float scale;
  float soft_cap;  // 0 = none
  int32_t num_threads;
  // 16-bit copies of a request's first and newest cached tokens, read instead of their codes where
  // the batch's copy_table says so.
  void* copy_key;      // [num_copy_rows, num_kv_heads, head_dim]
  void* copy_value;    // as copy_key, with its strides
  int32_t copy_dtype;  // FqDtype of both
  int32_t num_first;
  int64_t num_copy_rows;
  int64_t stride_copy_row, stride_copy_head;  // elements
  // Positions below keep_first are seen whatever the reach, scored with these queries.
  const void* first_query;  // [num_tokens, num_q_heads, head_dim]; unused if keep_first is 0
  int64_t stride_first_query_token, stride_first_query_head;
  int64_t keep_first;       // 0 = none; not with raw_key or key_map
  const FqKeyMap* key_map;  // null = keys are coded as they are
};

}  // extern "C"
