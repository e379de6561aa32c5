// SPDX-License-Identifier: Apache-2.0
// Calls of layers with latent attention in the C ABI of the CPU library, as params.h has those of
// others. Their pages are uint8 [num_blocks, block_size, record_bytes], FqPages with one KV head;
// of their codec key and value are the same code.
#pragma once

#include <cstdint>

extern "C" {

struct FqEncodeLatents {
  const void* latent;           // [num_tokens, head_dim]
  const void* rotary;           // [num_tokens, rotary_dim]
  const int64_t* slot_mapping;  // [num_tokens]; -1 = skip
  int64_t num_tokens;
  int64_t stride_latent, stride_rotary;  // elements
  int32_t rotary_dim;                    // a multiple of 16, at most 512
  int32_t dtype;                         // FqDtype
  int32_t num_threads;
};

struct FqAttendLatents {
  const void* query;                            // [num_reqs, num_heads, head_dim + rotary_dim]
  void* out;                                    // [num_reqs, num_heads, head_dim], contiguous
  const int32_t* block_table;                   // [num_reqs, stride_block_table]
  const int32_t* seq_lens;                      // [num_reqs]
  int64_t stride_query_req, stride_query_head;  // elements
  int64_t stride_block_table;                   // elements; also its number of columns
  int32_t num_reqs;
  int32_t num_heads;
  int32_t rotary_dim;  // as in FqEncodeLatents
  int32_t dtype;       // FqDtype of query and out
  int32_t num_threads;
  float scale;
};

}  // extern "C"
