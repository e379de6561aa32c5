// SPDX-License-Identifier: Apache-2.0
// Encode and store: keys and values to the records of their slots, in one launch.
//
// blockIdx.y 0 takes keys, 1 values. A warp owns one vector at a time: it scales and rotates it,
// each lane finds the nearest codewords of its subvectors, and the warp packs the indices into
// words. Bytes of a record belong to exactly one warp.
//
// With a map of keys (kMapped) a vector is first freed of what is known of it: of the means of
// first tokens, or of the mean of all keys; and keys of later tokens are transformed in the place
// of the rotation, and coded by the product code. Vectors of one head then come one after the
// other, for they read one matrix.
//
// The vectors of some tokens are also copied as they are (copies.h reads them), to rows that the
// caller names and no two tokens share.
//
// The empty case: a slot of -1 writes nothing. A vector that holds a NaN or an infinity, or nothing
// above the least normal number, is stored as zeros. Both kinds of trouble are counted; with a map
// a position outside its tables is as a slot outside the cache.
//
// Shared memory: rows [kRows, dim] and half squares [kRows], with a map those of the product code
// too | per warp: y [d], indices [d / 2], with a map x [d].
#pragma once

#include <type_traits>

#include "cuda/key_map.h"
#include "cuda/params.h"
#include "cuda/prepare.h"
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
  FqCudaKeyMap map;
};

constexpr int kProductDims = 2 + 4 + 8;

constexpr int encode_shared_bytes(int head_dim, bool is_mapped) {
  const int tables = kMaxSubvecDim + 1 + is_mapped * (kProductDims + 3);
  return (kRows * tables + kEncodeWarps * (head_dim + head_dim / 2 + is_mapped * head_dim)) * 4;
}

// Copies a code's rows and half squares to shared memory; returns what is behind them.
FQ_DEVICE float* copy_rows(const FqCudaCode& code, float* to) {
  for (int i = thread_idx(); i < kRows * code.subvec_dim; i += num_threads()) to[i] = code.rows[i];
  to += kRows * code.subvec_dim;
  for (int i = thread_idx(); i < kRows; i += num_threads()) to[i] = code.half_sq[i];
  return to + kRows;
}

// What the search of one lane adds up, for the gain.
struct Match {
  float dot, sq;  // <y, v>, |v|^2 of the subvectors' codewords v
};

// Nearest rows of the subvectors of y, float [num_subvecs, kDim]; ties go to the lowest index. The
// rows are followed by their half squares. `weight` is of the coordinates of y, null for 1.
template <int kDim>
FQ_DEVICE Match search(const FqCudaCode& code, const float* rows, const float* weight,
                       const float* y, int num_subvecs, uint32_t* index) {
  Match match = {0.0f, 0.0f};
  const float* half_sq = rows + kRows * kDim;
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
      const float w = weight ? weight[subvec * kDim + i] : 1.0f;
      match.dot += w * part[i] * c;
      match.sq += w * c * c;
    }
    index[subvec] = (uint32_t)best_row | pattern << 8;
  }
  return match;
}

// Subtracts from the warp's x [kHeadDim], in shared memory, what is known of a key or value.
template <int kHeadDim>
FQ_DEVICE void subtract_known(const FqCudaKeyMap& map, bool is_value, int head, int64_t position,
                              float* x) {
  const bool is_first = position < map.num_plain;
  const float* mean = is_value ? nullptr : map.mean + head * kHeadDim;
  if (is_first) {
    const float* known = is_value ? map.first_value : map.first_key;
    const int64_t at = ((int64_t)head * map.num_first + position) * kHeadDim;
    mean = position < map.num_first ? known + at : nullptr;
  }
  if (mean) {
    for (int c = lane_idx(); c < kHeadDim; c += kWarp) x[c] -= mean[c];
  }
  if (is_value || is_first) return;
  sync_warp();
  for (int j = lane_idx(); j < map.num_turning; j += kWarp) {
    const TurnPair pair = load_turn(map, head, j);
    if (pair.first < 0) continue;
    const Angle angle = angle_at(map, pair.column, position);
    x[pair.first] -= pair.c0 * angle.cosine - pair.c1 * angle.sine;
    x[pair.second] -= pair.c1 * angle.cosine + pair.c0 * angle.sine;
  }
}

// Codes the transformed direction y [num_coded] of a key; `rows` as encode's shared memory begins.
FQ_DEVICE Match search_product(const FqCudaKeyMap& map, const float* rows, const float* weight,
                               const float* y, uint32_t* index) {
  const int n2 = map.num_subvecs[0], n4 = map.num_subvecs[1], end_4 = 2 * n2 + 4 * n4;
  const Match a = search<2>(map.codes[0], rows, weight, y, n2, index);
  rows += kRows * 3;
  const Match b = search<4>(map.codes[1], rows, weight + 2 * n2, y + 2 * n2, n4, index + n2);
  rows += kRows * 5;
  const Match c =
      search<8>(map.codes[2], rows, weight + end_4, y + end_4, map.num_subvecs[2], index + n2 + n4);
  return {a.dot + b.dot + c.dot, a.sq + b.sq + c.sq};
}

// Copies the warp's vector, one that holds a NaN or an infinity as zeros, to its token's row.
template <int kHeadDim>
FQ_DEVICE void copy_vector(const FqCudaEncode& a, bool is_value, int num_kv_heads, int head,
                           int64_t token, const float (&v)[kLaneCoords<kHeadDim>]) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const int64_t row = a.copy_rows[token];
  if (row < 0 || row >= a.num_copy_rows) return;
  bool bad = false;
  for (int i = 0; i < kPerLane; ++i) bad |= !(absolute(v[i]) < bits_to_float(0x7F800000));
  bad = any(bad);
  const int first = lane_idx() * kPerLane;
  const int64_t at = (row * num_kv_heads + head) * kHeadDim + first;
  void* to = is_value ? a.copy_value : a.copy_key;
  for (int i = 0; i < kPerLane; ++i) {
    if (holds<kHeadDim>(first + i)) store_element(to, at + i, a.copy_dtype, bad ? 0.0f : v[i]);
  }
}

template <int kHeadDim, int kMapped>
FQ_KERNEL(kEncodeWarps* kWarp, 1)
encode(FQ_PARAM EncodeArgs args) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaEncode& a = args.call;
  const bool is_value = cta_idx().y == 1;
  const FqCudaCode& code = is_value ? args.codec.value : args.codec.key;
  const void* x = is_value ? a.value : a.key;
  const int64_t stride_token = is_value ? a.stride_value_token : a.stride_key_token;
  const int64_t stride_head = is_value ? a.stride_value_head : a.stride_key_head;
  const int index_offset = is_value ? args.layout.value_index_offset : 0;
  const int norm_offset = is_value ? args.layout.value_norm_offset : args.layout.key_norm_offset;

  float* rows = reinterpret_cast<float*>(shared_memory());
  float* product_rows = rows + kRows * (kMaxSubvecDim + 1);
  float* y = product_rows + kMapped * kRows * (kProductDims + 3) +
             warp_idx() * (kHeadDim + kHeadDim / 2 + kMapped * kHeadDim);
  uint32_t* index = reinterpret_cast<uint32_t*>(y + kHeadDim);
  float* x_own = y + kHeadDim + kHeadDim / 2;
  copy_rows(code, rows);
  if (kMapped && !is_value && args.map.key_matrix_t) {
    float* to = product_rows;
    for (int i = 0; i < 3; ++i) to = copy_rows(args.map.codes[i], to);
  }
  sync_cta();

  const int64_t num_slots = args.pages.num_blocks * args.pages.block_size;
  const int64_t num_vectors = a.num_tokens * args.pages.num_kv_heads;
  const int first = lane_idx() * kPerLane;
  for (int64_t vector = (int64_t)cta_idx().x * kEncodeWarps + warp_idx(); vector < num_vectors;
       vector += (int64_t)num_ctas().x * kEncodeWarps) {
    const int64_t token = kMapped ? vector % a.num_tokens : vector / args.pages.num_kv_heads;
    const int head = (int)(kMapped ? vector / a.num_tokens : vector % args.pages.num_kv_heads);
    const int64_t slot = a.slot_mapping[token], position = kMapped ? a.positions[token] : 0;
    bool outside = slot >= num_slots;
    if (kMapped && args.map.num_turning)
      outside |= slot >= 0 && position >= (int64_t)args.map.num_steps * kTurnTile;
    if (kMapped) outside |= slot >= 0 && position < 0;
    if (outside && !is_value && lane_idx() == 0) atomic_add(a.counters + 1, 1);
    if (slot < 0 || outside) continue;
    const bool is_product =
        kMapped && !is_value && args.map.key_matrix_t && position >= args.map.num_plain;
    const int num_coded = is_product ? args.map.num_coded : kHeadDim;

    // Dividing by the peak first keeps every square inside float32.
    float v[kPerLane], peak = 0.0f, sum = 0.0f;
    bool bad = false;
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = 0.0f;
      if (holds<kHeadDim>(first + i))
        v[i] = load_element(x, token * stride_token + head * stride_head + first + i, a.dtype);
    }
    if (a.copy_rows) copy_vector<kHeadDim>(a, is_value, args.pages.num_kv_heads, head, token, v);
    if (kMapped) {
      sync_warp();  // the previous vector's x has been read
      store_own<kHeadDim>(v, x_own);
      sync_warp();
      subtract_known<kHeadDim>(args.map, is_value, head, position, x_own);
      sync_warp();
      load_own<kHeadDim>(x_own, v);
    }
    for (int i = 0; i < kPerLane; ++i) {
      bad |= !(absolute(v[i]) < bits_to_float(0x7F800000));
      peak = maximum(peak, absolute(v[i]));
    }
    bad = any(bad);
    peak = warp_max(peak);
    bool usable = !bad && peak >= kMinNormal;
    if (bad && lane_idx() == 0) atomic_add(a.counters, 1);
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = usable ? v[i] / peak : 0.0f;
      sum += v[i] * v[i];
    }
    float length = square_root(warp_sum(sum));
    if (is_product) {
      store_own<kHeadDim>(v, x_own);
      sync_warp();
      const int64_t matrix = (int64_t)head * kHeadDim * num_coded;
      transform<kHeadDim>(args.map.key_matrix_t + matrix, num_coded, x_own, y);
      sync_warp();
      sum = 0.0f;
      for (int c = lane_idx(); c < num_coded; c += kWarp) sum += y[c] * y[c];
      length = square_root(warp_sum(sum));
      usable = usable && length > 0.0f;
      const float divisor = usable ? length : 1.0f;
      for (int c = lane_idx(); c < num_coded; c += kWarp)
        y[c] = y[c] / divisor * args.map.source_scale;
    } else {
      for (int i = 0; i < kPerLane; ++i) v[i] /= usable ? length : 1.0f;
      // Nobody reads the previous vector's y any more: the barrier behind its search is passed.
      rotate<kHeadDim>(args.codec, v, y, false);
      store_own<kHeadDim>(v, y);
    }
    sync_warp();  // y is written, and the previous vector's indices have been read
    Match match;
    if (is_product) {
      match = search_product(args.map, product_rows, args.map.weight + (int64_t)head * num_coded, y,
                             index);
    } else if (code.subvec_dim == 2) {
      match = search<2>(code, rows, nullptr, y, kHeadDim / 2, index);
    } else if (code.subvec_dim == 4) {
      match = search<4>(code, rows, nullptr, y, kHeadDim / 4, index);
    } else {
      match = search<8>(code, rows, nullptr, y, kHeadDim / 8, index);
    }
    sync_warp();
    const float dot = warp_sum(match.dot), sq = maximum(warp_sum(match.sq), 1e-12f);
    float gain = 1.0f;
    if (is_product) {
      gain = maximum(dot, 0.0f) / sq / args.map.source_scale;
    } else if (code.gain == kFqPreserve) {
      gain = 1.0f / square_root(sq);
    } else if (code.gain == kFqMse) {
      gain = maximum(dot, 0.0f) / sq;
    } else if (code.gain == kFqUnbiased) {
      gain = 1.0f / maximum(dot, kMinCosine);
    }
    const float norm = usable ? minimum(peak * length, 1e30f) * gain : 0.0f;

    uint8_t* record = args.pages.base + slot / args.pages.block_size * args.pages.stride_block +
                      head * args.pages.stride_head +
                      slot % args.pages.block_size * args.codec.record_bytes;
    const int* num = args.map.num_subvecs;
    const int bits = is_product ? 8 : code.index_bits;
    const int num_subvecs = is_product ? num[0] + num[1] + num[2] : kHeadDim / code.subvec_dim;
    using Word = std::conditional_t<kOddRecords<kHeadDim>, uint16_t, uint32_t>;
    constexpr int kWordBits = 8 * sizeof(Word);
    const int num_words = num_subvecs * bits / kWordBits;
    for (int word = lane_idx(); word < num_words; word += kWarp) {
      const int begin = word * kWordBits;
      uint32_t packed = 0;
      for (int i = begin / bits; i < num_subvecs && i * bits < begin + kWordBits; ++i) {
        const int shift = i * bits - begin;
        packed |= shift >= 0 ? index[i] << shift : index[i] >> -shift;
      }
      reinterpret_cast<Word*>(record + index_offset)[word] = (Word)(usable ? packed : 0);
    }
    if (lane_idx() == 0) {
      *reinterpret_cast<uint16_t*>(record + norm_offset) =
          (uint16_t)to_half2(minimum(norm, kMaxNorm), 0.0f);
    }
  }
}

}  // namespace fq
