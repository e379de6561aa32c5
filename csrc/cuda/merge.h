// SPDX-License-Identifier: Apache-2.0
// Merges the states of splits, in order of position, with raw new tokens and sinks, un-rotates, and
// writes outputs. A warp owns one row. A row that saw no token is zeros. Rows of tokens outside
// query_start_loc are not touched.
#pragma once

#include "cuda/attend.h"

namespace fq {

constexpr int kMergeWarps = 4;

template <int kHeadDim>
FQ_KERNEL(kMergeWarps* kWarp, 1)
merge(FQ_PARAM AttendArgs args) {
  constexpr int kPerLane = kHeadDim / kWarp;
  const FqCudaAttend& a = args.call;
  const int64_t row = (int64_t)cta_idx().x * kMergeWarps + warp_idx();
  const int64_t token = row / a.num_q_heads;
  const int head = (int)(row % a.num_q_heads);
  if (token < a.query_start_loc[0] || token >= a.query_start_loc[a.num_reqs]) return;

  const int first = lane_idx() * kPerLane;
  float m = kEmpty, l = 0.0f, o[kPerLane] = {};
  for (int split = 0; split < a.num_splits; ++split) {
    const int64_t at = row * a.num_splits + split;
    const float split_m = a.state_ml[at * 2], split_l = a.state_ml[at * 2 + 1];
    if (split_l == 0.0f) continue;  // nothing seen; NaN is not 0
    const float new_m = maximum(m, split_m);
    const float here = exp2_fast(m - new_m), there = exp2_fast(split_m - new_m);
    for (int i = 0; i < kPerLane; ++i)
      o[i] = o[i] * here + a.state_o[at * kHeadDim + first + i] * there;
    l = l * here + split_l * there;
    m = new_m;
  }
  float* scratch = reinterpret_cast<float*>(shared_memory()) + warp_idx() * kHeadDim;
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
    float x = o[i] * unit;
    if (raw_l != 0.0f) x += a.raw_o[row * kHeadDim + first + i] * raw_weight;
    store_element(a.out, at_out + i, a.dtype, x * inverse);
  }
}

}  // namespace fq
