// SPDX-License-Identifier: Apache-2.0
// The C ABI of the CUDA library: plain structs, which vllm_fibquant/ops/cuda.py fills. Nothing here
// depends on Python or torch. Unless said otherwise, pointers are to device memory; kernels read
// every length there.
#pragma once

#include <cstdint>

#include "abi.h"

extern "C" {

// One vector code, of keys or of values.
struct FqCudaCode {
  int32_t subvec_dim;
  int32_t index_bits;
  int32_t folded;  // 0 or 1
  int32_t gain;    // FqGain
  float table_scale;
  int32_t num_rows;       // 256: codewords, or magnitudes of a sign-folded codebook
  const uint16_t* table;  // float16 [num_rows, subvec_dim], 16-byte aligned; row = scale * table
  const float* rows;      // [num_rows, subvec_dim], 16-byte aligned
  const float* half_sq;   // [num_rows], |row|^2 / 2
};

struct FqCudaCodec {
  int32_t head_dim;
  int32_t record_bytes;            // must equal record_layout(...).record_bytes
  const float* rotation_signs;     // [head_dim] of +-1 for a Hadamard rotation, else null
  const float* rotation_matrix;    // [head_dim, head_dim] row-major, y = M x; null for Hadamard
  const float* rotation_matrix_t;  // its transpose; null for Hadamard
  FqCudaCode key;
  FqCudaCode value;
};

// How keys are coded where they have a map (vllm_fibquant/keys/key_map.py).
struct FqCudaKeyMap {
  const float* mean;  // [num_kv_heads, head_dim]
  // Of a transform, or null. Columns of query_matrix_t hold the table_scale of their code as well.
  const float* key_matrix_t;    // [num_kv_heads, head_dim, num_coded], z = M k
  const float* query_matrix_t;  // [num_kv_heads, head_dim, num_coded], w = M q
  const float* weight;          // [num_kv_heads, num_coded]
  FqCudaCode codes[3];          // of 2, 4 and 8 coordinates; 8 index bits, not folded
  // Means at a request's first positions, or null.
  const float* first_key;    // [num_kv_heads, num_first, head_dim]
  const float* first_value;  // [num_kv_heads, num_first, head_dim]
  // The part of the mean that turns, or null: R_p c. The angle of pair j at position p is that of
  // row p / 16 of turn_coarse and that of row p % 16 of turn_fine together.
  const int32_t* turn_pairs;  // [num_kv_heads, num_turning, 4]: two coordinates (-1: no pair), the
                              // pair's column in the tables, 0
  const float* turn_mean;     // [num_kv_heads, num_turning, 2], c
  const float* turn_fine;     // [16, num_pairs, 2], cosine and sine
  const float* turn_coarse;   // [num_steps, num_pairs, 2]
  int32_t num_coded;          // head_dim without a transform
  int32_t num_subvecs[3];     // of each of codes
  int32_t num_plain;          // first tokens of a request, coded by the codec's own codes
  int32_t num_first;          // of them, those that have means
  int32_t num_turning;        // a multiple of 8
  int32_t num_pairs;
  int32_t num_steps;
  float source_scale;  // length that codes expect of a transformed direction
};

struct FqCudaEncode {
  const void* key;              // [num_tokens, num_kv_heads, head_dim]
  const void* value;            // [num_tokens, num_kv_heads, head_dim]
  const int64_t* slot_mapping;  // [num_tokens]; -1 = skip
  const int64_t* positions;     // [num_tokens], in their requests; read with a key map alone
  int32_t* counters;            // [2], added to: vectors with a NaN or infinity, slots outside
  int64_t num_tokens;
  int64_t stride_key_token, stride_key_head;      // elements
  int64_t stride_value_token, stride_value_head;  // elements
  int32_t dtype;                                  // FqDtype
  int32_t max_ctas;                               // per side; more vectors are looped over
  // Copies of vectors as they are, or null: [num_copy_rows, num_kv_heads, head_dim]. A token goes
  // to row copy_rows[token], distinct for all tokens of a launch; -1 = none.
  int32_t copy_dtype;  // FqDtype
  int32_t num_copy_rows;
  void* copy_key;
  void* copy_value;
  const int32_t* copy_rows;  // [num_tokens]
};

struct FqCudaAttend {
  const void* query;               // [num_tokens, num_q_heads, head_dim]
  void* out;                       // [num_tokens, num_q_heads, head_dim]
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
  const int32_t* block_table;      // [num_reqs, table_width]
  const float* sinks;              // [num_q_heads] or null
  // States of the new tokens from raw keys and values, row = token * num_q_heads + head; given,
  // codes are attended for the tokens before them only. Weights are relative to exp(raw_m).
  const float* raw_o;  // [num_tokens * num_q_heads, head_dim] or null
  const float* raw_m;  // [num_tokens * num_q_heads] or null
  const float* raw_l;  // [num_tokens * num_q_heads] or null
  // Scratch that the launch fills and reads again: states of splits. Null with one split, whose
  // outputs are written directly.
  float* state_o;   // [num_tokens * num_q_heads, num_splits, head_dim], 16-byte aligned
  float* state_ml;  // [num_tokens * num_q_heads, num_splits, 2], 8-byte aligned
  // Copies that are read in the place of codes, or null; raw states must be given with them. The
  // table [num_reqs, num_copy_columns] has the row of a request's token at position 0, 1, ...
  // num_copied_first - 1, then of those at the last positions before its first new token; -1 where
  // there is no copy, or no such token.
  const int32_t* copy_table;
  const void* copy_key;    // [num_copy_rows, num_kv_heads, head_dim], 16-byte aligned
  const void* copy_value;  // as copy_key
  // Scratch of a key map, of copies or of kept first tokens: fq_cuda_prepared_floats for each row.
  // Null without all of them.
  float* prepared;
  const void* first_query;     // as query; what positions below keep_first are scored with
  int64_t stride_block_table;  // elements
  int64_t stride_query_token, stride_query_head;
  int64_t stride_out_token, stride_out_head;
  int64_t stride_first_query_token, stride_first_query_head;
  int64_t num_tokens;  // rows of query: at least query_start_loc[num_reqs]
  int32_t num_reqs;
  int32_t num_q_heads;
  int32_t table_width;
  int32_t dtype;  // FqDtype of query and out
  int32_t reach;  // n > 0: a query sees the newest n, a window; n < 0: its chunk of -n; 0: all
  int32_t num_splits;
  int32_t wide;  // 1 = many query columns share a decoded token, 0 = at most 8
  int32_t num_copy_columns;
  int32_t num_copied_first;
  int32_t num_copy_rows;
  int32_t copy_dtype;  // FqDtype, of 16 bits
  // Positions below this one are seen whatever the reach. 0 with a key map, copies or raw states.
  int32_t keep_first;
  float scale;
  float soft_cap;  // 0 = none
};

// One step of a pool of copies (copy_plan.h).
struct FqCudaPlan {
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
  const int32_t* block_table;      // [num_reqs, table_width]
  const int64_t* slots;            // [num_tokens]; -1 = none
  int64_t* tags;    // [rows and kCopyUnit more]: the slot whose copy a row holds, -1 for none
  int32_t* wanted;  // [num_tokens], scratch
  int32_t* rows;    // [num_tokens], written: FqCudaEncode.copy_rows
  int32_t* table;   // [num_reqs, num_first + num_recent], written: FqCudaAttend.copy_table
  int64_t stride_block_table;  // elements
  int64_t num_tokens;
  int32_t num_reqs;
  int32_t table_width;
  int32_t block_size;
  int32_t num_first;
  int32_t num_recent;
  int32_t first_units;   // of num_first rows each; they come first
  int32_t recent_units;  // of kCopyUnit rows each
};

}  // extern "C"
