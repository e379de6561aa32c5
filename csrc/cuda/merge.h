// SPDX-License-Identifier: Apache-2.0
// Merges the states of splits, in order of position, with raw new tokens and sinks, un-rotates, and
// writes outputs. A warp owns one row. A row that saw no token is zeros. Rows of tokens outside
// query_start_loc are not touched.
//
// Lanes read the (m, l) of 32 splits at once; what is left per split is to add its o, and those
// loads wait for nothing but their weights.
//
// Shared memory: per warp, scratch of a rotation [d], weights of 32 splits.
#pragma once

#include "cuda/attend.h"

namespace fq {

constexpr int kMergeWarps = 4, kMergeAhead = 8;

constexpr int merge_shared_bytes(int head_dim) { return kMergeWarps * (head_dim + kWarp) * 4; }

// Writes the output of one row of the query tensor, row = token * num_q_heads + head, from the
// state (m, l, o) of its codes, rotated and in units of value.table_scale.
template <int kHeadDim>
FQ_DEVICE void write_row(const AttendArgs& args, int64_t row, float m, float l,
                         float (&o)[kLaneCoords<kHeadDim>], float* scratch) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const int64_t token = row / a.num_q_heads;
  const int head = (int)(row % a.num_q_heads), first = lane_idx() * kPerLane;
  rotate<kHeadDim>(args.codec, o, scratch, true);

  // The weights of the parts: codes, raw tokens, the sink (a logit without a value).
  float new_m = m, raw_m = kEmpty, raw_l = 0.0f, sink = kEmpty;
  if (a.raw_o) {
    raw_m = a.raw_m[row] * kLog2e;
    raw_l = a.raw_l[row];
    new_m = maximum(new_m, raw_m);
  }
  if (a.sinks) {
    sink = a.sinks[head] * kLog2e;
    new_m = maximum(new_m, sink);
  }
  const float weight = exp2_fast(m - new_m);
  float raw_weight = 0.0f;
  l *= weight;
  if (a.raw_o) {
    raw_weight = exp2_fast(raw_m - new_m);
    l += raw_l * raw_weight;
  }
  if (a.sinks) l += exp2_fast(sink - new_m);
  const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
  const float unit = weight * args.codec.value.table_scale;
  const int64_t at_out = token * a.stride_out_token + head * a.stride_out_head + first;
  for (int i = 0; i < kPerLane; ++i) {
    if (!holds<kHeadDim>(first + i)) continue;
    float x = o[i] * unit;
    if (raw_l != 0.0f) x += a.raw_o[row * kHeadDim + first + i] * raw_weight;
    store_element(a.out, at_out + i, a.dtype, x * inverse);
  }
}

template <int kHeadDim>
FQ_KERNEL(kMergeWarps* kWarp, 1)
merge(FQ_PARAM AttendArgs args) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const int64_t row = (int64_t)cta_idx().x * kMergeWarps + warp_idx();
  const int64_t token = row / a.num_q_heads;
  if (token < a.query_start_loc[0] || token >= a.query_start_loc[a.num_reqs]) return;

  float* scratch = reinterpret_cast<float*>(shared_memory()) + warp_idx() * (kHeadDim + kWarp);
  float* weights = scratch + kHeadDim;
  const float* from = a.state_o + row * a.num_splits * kHeadDim;
  float m = kEmpty, l = 0.0f, o[kPerLane] = {};
  for (int begin = 0; begin < a.num_splits; begin += kWarp) {
    const int split = begin + lane_idx();
    float split_m = kEmpty, split_l = 0.0f;
    if (split < a.num_splits) {
      const Pair ml = load_pair(a.state_ml + (row * a.num_splits + split) * 2);
      split_m = bits_to_float(ml.x);
      split_l = bits_to_float(ml.y);
    }
    const bool seen = split_l != 0.0f;  // NaN is not 0
    const float new_m = maximum(m, warp_max(seen ? split_m : kEmpty));
    const float weight = seen ? exp2_fast(split_m - new_m) : 0.0f, old = exp2_fast(m - new_m);
    sync_warp();  // the weights before these have been read
    weights[lane_idx()] = weight;
    sync_warp();
    l = l * old + warp_sum(seen ? split_l * weight : 0.0f);
    m = new_m;
    for (int i = 0; i < kPerLane; ++i) o[i] *= old;
    const int count = a.num_splits - begin < kWarp ? a.num_splits - begin : kWarp;
    for (int at = 0; at < count; at += kMergeAhead) {
      float part[kMergeAhead][kPerLane];
#pragma unroll
      for (int j = 0; j < kMergeAhead; ++j) {
        for (int i = 0; i < kPerLane; ++i) part[j][i] = 0.0f;
        if (at + j < count && weights[at + j] != 0.0f)  // what saw nothing has stored no o
          load_own<kHeadDim>(from + (int64_t)(begin + at + j) * kHeadDim, part[j]);
      }
#pragma unroll
      for (int j = 0; j < kMergeAhead; ++j) {
        if (at + j >= count) continue;
        for (int i = 0; i < kPerLane; ++i) o[i] += part[j][i] * weights[at + j];
      }
    }
  }
  write_row<kHeadDim>(args, row, m, l, o, scratch);
}

}  // namespace fq
