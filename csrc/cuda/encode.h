// SPDX-License-Identifier: Apache-2.0
// Encode and store: keys and values to the records of their slots, in one launch.
//
// blockIdx.y 0 takes keys, 1 values. A warp owns one vector at a time: it scales and rotates it,
// each lane finds the nearest codewords of its subvectors, and the warp packs the indices into
// 32-bit words. Bytes of a record belong to exactly one warp.
//
// The empty case: a slot of -1 writes nothing. A vector that holds a NaN or an infinity, or nothing
// above the least normal number, is stored as zeros. Both kinds of trouble are counted.
//
// Shared memory: rows [kRows, dim] | half squares [kRows] | per warp: y [d], indices [d / 2].
#pragma once

#include "cuda/params.h"
#include "cuda/rotation.h"
#include "cuda/supported.h"
#include "page_layout.h"

namespace fq {

constexpr int kEncodeWarps = 8, kMaxSubvecDim = 8;
constexpr float kMaxNorm = 65504.0f, kMinCosine = 0.25f;

struct EncodeArgs {
  FqCudaCodec codec;
  FqPages pages;
  FqCudaEncode call;
  RecordLayout layout;
};

constexpr int encode_shared_bytes(int head_dim) {
  return (kRows * (kMaxSubvecDim + 1) + kEncodeWarps * (head_dim + head_dim / 2)) * 4;
}

// What the search of one lane adds up, for the gain.
struct Match {
  float dot, sq;  // <y, v>, |v|^2 of the subvectors' codewords v
};

// Nearest rows of the subvectors of y, float [num_subvecs, kDim]; ties go to the lowest index.
template <int kDim>
FQ_DEVICE Match search(const FqCudaCode& code, const float* rows, const float* half_sq,
                       const float* y, int num_subvecs, uint32_t* index) {
  Match match = {0.0f, 0.0f};
  for (int subvec = lane_idx(); subvec < num_subvecs; subvec += kWarp) {
    float part[kDim];
    uint32_t pattern = 0;
#pragma unroll
    for (int i = 0; i < kDim; ++i) {
      part[i] = y[subvec * kDim + i];
      if (code.folded && part[i] < 0.0f) {
        pattern |= 1u << i;
        part[i] = -part[i];
      }
    }
    float best = -bits_to_float(0x7F800000);
    int best_row = 0;
#pragma unroll 4
    for (int row = 0; row < kRows; ++row) {
      float score = -half_sq[row];
#pragma unroll
      for (int i = 0; i < kDim; ++i) score += part[i] * rows[row * kDim + i];
      if (score > best) {
        best = score;
        best_row = row;
      }
    }
#pragma unroll
    for (int i = 0; i < kDim; ++i) {
      const float c = rows[best_row * kDim + i];
      match.dot += part[i] * c;
      match.sq += c * c;
    }
    index[subvec] = (uint32_t)best_row | pattern << 8;
  }
  return match;
}

template <int kHeadDim>
FQ_KERNEL(kEncodeWarps* kWarp, 1)
encode(FQ_PARAM EncodeArgs args) {
  constexpr int kPerLane = kHeadDim / kWarp;
  const FqCudaEncode& a = args.call;
  const bool is_value = cta_idx().y == 1;
  const FqCudaCode& code = is_value ? args.codec.value : args.codec.key;
  const void* x = is_value ? a.value : a.key;
  const int64_t stride_token = is_value ? a.stride_value_token : a.stride_key_token;
  const int64_t stride_head = is_value ? a.stride_value_head : a.stride_key_head;
  const int index_offset = is_value ? args.layout.value_index_offset : 0;
  const int norm_offset = is_value ? args.layout.value_norm_offset : args.layout.key_norm_offset;
  const int num_subvecs = kHeadDim / code.subvec_dim;

  float* rows = reinterpret_cast<float*>(shared_memory());
  float* half_sq = rows + kRows * kMaxSubvecDim;
  float* y = half_sq + kRows + warp_idx() * (kHeadDim + kHeadDim / 2);
  uint32_t* index = reinterpret_cast<uint32_t*>(y + kHeadDim);
  for (int i = thread_idx(); i < kRows * code.subvec_dim; i += num_threads())
    rows[i] = code.rows[i];
  for (int i = thread_idx(); i < kRows; i += num_threads()) half_sq[i] = code.half_sq[i];
  sync_cta();

  const int64_t num_slots = args.pages.num_blocks * args.pages.block_size;
  const int64_t num_vectors = a.num_tokens * args.pages.num_kv_heads;
  const int first = lane_idx() * kPerLane;
  for (int64_t vector = (int64_t)cta_idx().x * kEncodeWarps + warp_idx(); vector < num_vectors;
       vector += (int64_t)num_ctas().x * kEncodeWarps) {
    const int64_t token = vector / args.pages.num_kv_heads;
    const int head = (int)(vector % args.pages.num_kv_heads);
    const int64_t slot = a.slot_mapping[token];
    if (slot >= num_slots && !is_value && lane_idx() == 0) atomic_add(a.counters + 1, 1);
    if (slot < 0 || slot >= num_slots) continue;

    // Dividing by the peak first keeps every square inside float32.
    float v[kPerLane], peak = 0.0f, sum = 0.0f;
    bool bad = false;
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = load_element(x, token * stride_token + head * stride_head + first + i, a.dtype);
      bad |= !(absolute(v[i]) < bits_to_float(0x7F800000));
      peak = maximum(peak, absolute(v[i]));
    }
    bad = any(bad);
    peak = warp_max(peak);
    const bool usable = !bad && peak >= kMinNormal;
    if (bad && lane_idx() == 0) atomic_add(a.counters, 1);
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = usable ? v[i] / peak : 0.0f;
      sum += v[i] * v[i];
    }
    const float length = usable ? square_root(warp_sum(sum)) : warp_sum(sum) + 1.0f;
    for (int i = 0; i < kPerLane; ++i) v[i] /= length;
    rotate<kHeadDim>(args.codec, v, y, false);

    sync_warp();  // the previous vector's y and indices have been read
    for (int i = 0; i < kPerLane; ++i) y[first + i] = v[i];
    sync_warp();
    Match match;
    if (code.subvec_dim == 2) {
      match = search<2>(code, rows, half_sq, y, num_subvecs, index);
    } else if (code.subvec_dim == 4) {
      match = search<4>(code, rows, half_sq, y, num_subvecs, index);
    } else {
      match = search<8>(code, rows, half_sq, y, num_subvecs, index);
    }
    sync_warp();
    const float dot = warp_sum(match.dot), sq = maximum(warp_sum(match.sq), 1e-12f);
    float gain = 1.0f;
    if (code.gain == kFqPreserve) gain = 1.0f / square_root(sq);
    if (code.gain == kFqMse) gain = maximum(dot, 0.0f) / sq;
    if (code.gain == kFqUnbiased) gain = 1.0f / maximum(dot, kMinCosine);
    const float norm = usable ? minimum(peak * length, 1e30f) * gain : 0.0f;

    uint8_t* record = args.pages.base + slot / args.pages.block_size * args.pages.stride_block +
                      head * args.pages.stride_head +
                      slot % args.pages.block_size * args.codec.record_bytes;
    const int bits = code.index_bits, num_words = num_subvecs * bits / 32;
    for (int word = lane_idx(); word < num_words; word += kWarp) {
      uint32_t packed = 0;
      for (int i = word * 32 / bits; i < num_subvecs && i * bits < word * 32 + 32; ++i) {
        const int shift = i * bits - word * 32;
        packed |= shift >= 0 ? index[i] << shift : index[i] >> -shift;
      }
      reinterpret_cast<uint32_t*>(record + index_offset)[word] = usable ? packed : 0;
    }
    if (lane_idx() == 0) {
      *reinterpret_cast<uint16_t*>(record + norm_offset) =
          (uint16_t)to_half2(minimum(norm, kMaxNorm), 0.0f);
    }
  }
}

}  // namespace fq
