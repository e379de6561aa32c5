// SPDX-License-Identifier: Apache-2.0
// What the C ABIs of the CPU and the CUDA library share. vllm_fibquant/ops/abi.py reads the structs
// of this header and of the others that vllm_fibquant/headers.py names.
#pragma once

#include <cstdint>

extern "C" {

enum FqDtype : int32_t { kFqFloat32 = 0, kFqBFloat16 = 1, kFqFloat16 = 2 };
enum FqGain : int32_t { kFqNorm = 0, kFqPreserve = 1, kFqMse = 2, kFqUnbiased = 3 };

// The pages of one layer: uint8 [num_blocks, num_kv_heads, block_size, record_bytes]. On a GPU base
// and strides are multiples of 16 bytes, and block_size is one of 16 tokens.
struct FqPages {
  uint8_t* base;
  int64_t num_blocks;
  int64_t stride_block;  // bytes
  int64_t stride_head;   // bytes
  int32_t num_kv_heads;
  int32_t block_size;
};

}  // extern "C"
