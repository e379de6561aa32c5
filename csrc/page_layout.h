// SPDX-License-Identifier: Apache-2.0
// Where every byte of a page is. The same contract as vllm_fibquant/codec/layout.py, which explains
// it; tests/codec/test_layout.py compares the two.
//
//   offset                       bytes              content
//   0                            key_index_bytes    key indices, packed LSB first
//   key_index_bytes              value_index_bytes  value indices, packed LSB first
//   key_norm_offset              2                  key norm, little-endian float16
//   value_norm_offset            2                  value norm, as well
#pragma once

#include <cstdint>

namespace fq {

constexpr int32_t kNormBytes = 2;

struct RecordLayout {
  int32_t key_index_offset;
  int32_t value_index_offset;
  int32_t key_norm_offset;
  int32_t value_norm_offset;
  int32_t record_bytes;
};

constexpr int32_t index_bytes(int32_t num_subvecs, int32_t index_bits) {
  return (num_subvecs * index_bits + 7) / 8;
}

constexpr RecordLayout record_layout(int32_t key_index_bytes, int32_t value_index_bytes) {
  const int32_t key_norm = (key_index_bytes + value_index_bytes + 1) & ~1;
  const int32_t value_norm = key_norm + kNormBytes;
  return {0, key_index_bytes, key_norm, value_norm, value_norm + kNormBytes};
}

// head_dim 128, subvec_dim 4, 256 codewords: 32 + 32 index bytes and two norms.
static_assert(record_layout(index_bytes(32, 8), index_bytes(32, 8)).record_bytes == 68);
// An odd number of index bytes is padded, so that norms stay 2-byte aligned.
static_assert(record_layout(3, 2).key_norm_offset == 6);

}  // namespace fq
