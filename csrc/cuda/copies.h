// SPDX-License-Identifier: Apache-2.0
// Attention over copies of cached tokens in 16 bits, which stand in the place of their codes.
//
// A CTA owns a row block, 16 rows of one request and KV head, and goes through the request's line
// of the table in chunks of 32 tokens. They are put into shared memory as float32, where a lane
// scores one token for its warp's four rows, and then adds up its own coordinates of their values.
// Rows share what is read, and all arithmetic is float32: a chunk of a prompt attends some hundred
// copies beside thousands of codes.
//
// The state of a row is joined with that of raw new tokens (of first tokens as well, with a map of
// keys), in the same form, for the launches behind this one. A row without a copy has that state.
//
// Shared memory: queries [16, d] | keys [32, d + 4] | values [32, d] | weights [16, 32].
#pragma once

#include "cuda/attend.h"

namespace fq {

constexpr int kCopyWarps = 4, kCopyRows = 4, kCopyChunk = kWarp;  // rows of a warp, tokens at once
constexpr int kCopyColumns = kCopyWarps * kCopyRows;

constexpr int copies_shared_bytes(int head_dim) {
  return (kCopyColumns * (head_dim + kCopyChunk) + kCopyChunk * (2 * head_dim + 4)) * 4;
}

// The token of a column of the table: its row, and its position. The row is -1 if there is no copy.
struct CopyAt {
  int row, position;

  FQ_DEVICE static CopyAt find(const FqCudaAttend& a, const RowBlock& b, int column) {
    CopyAt at = {-1, column};
    if (column >= a.num_copied_first) at.position = b.context - (a.num_copy_columns - column);
    if (column < a.num_copy_columns && at.position >= 0)
      at.row = copy_row(a, b.req, b.context, at.position);
    // A first token that is a recent one as well is in the former's column.
    if (column >= a.num_copied_first && at.position < a.num_copied_first) at.row = -1;
    return at;
  }
};

// Eight numbers of 16 bits as float32.
FQ_DEVICE void widen(Quad from, int32_t dtype, float* to) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
  uint32_t out[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool is_half = dtype == kFqFloat16;
    out[2 * i] = is_half ? float_to_bits(from_half((uint16_t)words[i])) : words[i] << 16;
    out[2 * i + 1] =
        is_half ? float_to_bits(from_half((uint16_t)(words[i] >> 16))) : words[i] & 0xFFFF0000u;
  }
  store_quad(to, {out[0], out[1], out[2], out[3]});
  store_quad(to + 4, {out[4], out[5], out[6], out[7]});
}

// Puts a chunk of copies into shared memory; tokens without one are zeros. All threads take part.
template <int kHeadDim>
FQ_DEVICE void load_copies(const AttendArgs& args, const RowBlock& b, int kv_head, int begin,
                           float* keys, float* values) {
  constexpr int kParts = kHeadDim / 8;
  const FqCudaAttend& a = args.call;
  for (int i = thread_idx(); i < kCopyChunk * kParts; i += num_threads()) {
    const int token = i / kParts, part = i % kParts;
    const int64_t row = CopyAt::find(a, b, begin + token).row;
    Quad key = {0, 0, 0, 0}, value = {0, 0, 0, 0};
    if (row >= 0) {
      const int64_t at = ((row * args.pages.num_kv_heads + kv_head) * kHeadDim + part * 8) * 2;
      key = load_quad(static_cast<const uint8_t*>(a.copy_key) + at);
      value = load_quad(static_cast<const uint8_t*>(a.copy_value) + at);
    }
    widen(key, a.copy_dtype, keys + token * (kHeadDim + 4) + part * 8);
    widen(value, a.copy_dtype, values + token * kHeadDim + part * 8);
  }
}

// Joins a row's state over copies with the call's, which has natural scores, and stores it. `o`
// has the lane's coordinates.
template <int kHeadDim>
FQ_DEVICE void store_joined(const AttendArgs& args, int64_t row, float m, float l,
                            const float (&o)[kLaneCoords<kHeadDim>]) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const float raw_m = a.raw_m[row] * kLog2e, raw_l = a.raw_l[row], new_m = maximum(m, raw_m);
  const float weight = exp2_fast(m - new_m), raw_weight = exp2_fast(raw_m - new_m);
  const int64_t at = row * kHeadDim + lane_idx() * kPerLane;
  for (int i = 0; i < kPerLane; ++i) {
    if (!holds<kHeadDim>(lane_idx() * kPerLane + i)) continue;
    float x = o[i] * weight;
    if (raw_l != 0.0f) x += a.raw_o[at + i] * raw_weight;  // what saw nothing may have stored no o
    args.prepared.first_o[at + i] = x;
  }
  sync_warp();  // all lanes have read the row's m and l, which may be where these go
  if (lane_idx() == 0) {
    args.prepared.first_m[row] = new_m / kLog2e;
    args.prepared.first_l[row] = l * weight + raw_l * raw_weight;
  }
}

// grid [row blocks of kCopyColumns, num_kv_heads].
template <int kHeadDim>
FQ_KERNEL(kCopyWarps* kWarp, 1)
attend_copies(FQ_PARAM AttendArgs args) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>, kKeyStride = kHeadDim + 4;
  const FqCudaAttend& a = args.call;
  const int kv_head = cta_idx().y, group = a.num_q_heads / args.pages.num_kv_heads;
  const RowBlock b = RowBlock::find(a, group, kCopyColumns, cta_idx().x);
  if (b.num_rows <= 0) return;

  const int lane = lane_idx(), first_own = warp_idx() * kCopyRows;
  float* queries = reinterpret_cast<float*>(shared_memory()) + first_own * kHeadDim;
  float* keys = reinterpret_cast<float*>(shared_memory()) + kCopyColumns * kHeadDim;
  float* values = keys + kCopyChunk * kKeyStride;
  float* weights = values + kCopyChunk * kHeadDim + first_own * kCopyChunk;
  float m[kCopyRows], l[kCopyRows], o[kCopyRows][kPerLane];
  int seen[kCopyRows];  // the oldest position that a row sees
#pragma unroll
  for (int r = 0; r < kCopyRows; ++r) {
    const int number = b.first_row + first_own + r;
    const int64_t from = (b.first_token + number / group) * a.stride_query_token +
                         (kv_head * group + number % group) * a.stride_query_head;
    const bool exists = first_own + r < b.num_rows;
    for (int c = lane; c < kHeadDim; c += kWarp)
      queries[r * kHeadDim + c] = exists ? load_element(a.query, from + c, a.dtype) : 0.0f;
    seen[r] = first_seen(a.reach, b.context + number / group);
    m[r] = kEmpty;
    l[r] = 0.0f;
    for (int i = 0; i < kPerLane; ++i) o[r][i] = 0.0f;
  }

  for (int begin = 0; begin < a.num_copy_columns; begin += kCopyChunk) {
    const CopyAt own = CopyAt::find(a, b, begin + lane);
    if (!any(own.row >= 0)) continue;  // in all warps alike
    sync_cta();                        // the chunk before has been read
    load_copies<kHeadDim>(args, b, kv_head, begin, keys, values);
    sync_cta();
    float score[kCopyRows] = {};
#pragma unroll 4
    for (int c = 0; c < kHeadDim; c += 4) {
      float k[4];
      load_floats(keys + lane * kKeyStride + c, k);
#pragma unroll
      for (int r = 0; r < kCopyRows; ++r) {
        float q[4];
        load_floats(queries + r * kHeadDim + c, q);
        for (int i = 0; i < 4; ++i) score[r] += q[i] * k[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kCopyRows; ++r) {
      float x = score[r] * a.scale * kLog2e;
      if (a.soft_cap > 0.0f) x = args.cap_out * (1.0f - 2.0f / (1.0f + exp2_fast(x * args.cap_in)));
      const bool visible = own.row >= 0 && own.position >= seen[r];
      const float new_m = maximum(m[r], warp_max(visible ? x : kEmpty));
      const float weight = visible ? exp2_fast(x - new_m) : 0.0f, old = exp2_fast(m[r] - new_m);
      m[r] = new_m;
      l[r] = l[r] * old + warp_sum(weight);
      for (int i = 0; i < kPerLane; ++i) o[r][i] *= old;
      weights[r * kCopyChunk + lane] = weight;
    }
    sync_warp();
#pragma unroll 2
    for (int j = 0; j < kCopyChunk; ++j) {
      float v[kPerLane];
      load_own<kHeadDim>(values + j * kHeadDim, v);
#pragma unroll
      for (int r = 0; r < kCopyRows; ++r) {
        for (int i = 0; i < kPerLane; ++i) o[r][i] += weights[r * kCopyChunk + j] * v[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kCopyRows; ++r) {
    if (first_own + r >= b.num_rows) continue;
    store_joined<kHeadDim>(args, state_row(a, b, group, kv_head, first_own + r), m[r], l[r], o[r]);
  }
}

}  // namespace fq
