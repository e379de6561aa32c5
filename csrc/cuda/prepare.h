// SPDX-License-Identifier: Apache-2.0
// Attends the first tokens that are not attended as the others are, once for all splits of their
// sequence, and makes the rows of queries ready for mapped keys.
//
// First tokens stand apart with a map of keys (kMapped), where they are coded in another way, and
// where they are kept beside a window (keep_first), with queries of their own.
//
// A warp owns one row; the warps of a CTA take rows of one KV head, which read one matrix. Of each
// row it writes `Prepared`: the state of the first tokens, merged with that of raw new tokens where
// there are such; with a map also the transformed query (without a transform the rotated one),
// <q, m>, and what the query makes of cosines and sines.
//
// The empty case: a row that sees no first token, as where num_apart is 0, has the raw state, or an
// empty one (m = kEmpty, l = 0). Rows of tokens outside query_start_loc are not touched.
//
// Shared memory: per warp, a vector [d] twice.
#pragma once

#include "cuda/attend.h"
#include "cuda/request.h"

namespace fq {

constexpr int kPrepareWarps = 8;

constexpr int prepare_shared_bytes(int head_dim) { return kPrepareWarps * 2 * head_dim * 4; }

// y[c] = sum_j matrix_t[j, c] x[j] of x [head_dim] and y [num_coded], both in shared memory of the
// warp; lanes take neighbouring columns.
template <int kHeadDim>
FQ_DEVICE void transform(const float* matrix_t, int num_coded, const float* x, float* y) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  float sum[kPerLane] = {};
  for (int j = 0; j < kHeadDim; ++j) {
    const float factor = x[j];
    const float* row = matrix_t + (int64_t)j * num_coded;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int c = i * kWarp + lane_idx();
      if (c < num_coded) sum[i] += row[c] * factor;
    }
  }
  for (int i = 0; i < kPerLane; ++i) {
    const int c = i * kWarp + lane_idx();
    if (c < num_coded) y[c] = sum[i];
  }
}

// The state of a request's first tokens for one row. `x` is the query, `turned` the rotated one, as
// rotate() hands them out; so is o, in the model's basis.
template <int kHeadDim, int kMapped>
FQ_DEVICE void attend_first(const AttendArgs& args, int req, int kv_head, int context, int position,
                            int end, const float (&x)[kLaneCoords<kHeadDim>],
                            const float (&turned)[kLaneCoords<kHeadDim>], float* scratch, float* m,
                            float* l, float (&o)[kLaneCoords<kHeadDim>]) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const FqCudaKeyMap& map = args.map;
  const int first = lane_idx() * kPerLane;
  float means[kPerLane] = {};
  *m = kEmpty;
  *l = 0.0f;
  for (int i = 0; i < kPerLane; ++i) o[i] = 0.0f;
  const int stop = args.num_apart < end ? args.num_apart : end;
  const int begin = kMapped ? first_seen(a.reach, position) : 0;
  for (int token = begin; token < stop && token <= position; ++token) {
    if (copy_row(a, req, context, token) >= 0) continue;
    const int entry = token / args.pages.block_size, within = token % args.pages.block_size;
    int64_t block = -1;
    if (entry < a.table_width) block = a.block_table[req * a.stride_block_table + entry];
    const bool exists = block >= 0 && block < args.pages.num_blocks;
    const uint8_t* record = args.pages.base + (exists ? block : 0) * args.pages.stride_block +
                            kv_head * args.pages.stride_head + within * args.codec.record_bytes;
    const uint8_t* values = record + args.layout.value_index_offset;
    const float key_norm = from_half(load_as<uint16_t>(record + args.layout.key_norm_offset));
    const float value_norm = from_half(load_as<uint16_t>(record + args.layout.value_norm_offset));
    const bool known = kMapped && token < map.num_first;
    const int64_t at = ((int64_t)kv_head * map.num_first + token) * kHeadDim + first;
    float dot = 0.0f, value[kPerLane];
    for (int i = 0; i < kPerLane; ++i) {
      value[i] = 0.0f;
      if (!holds<kHeadDim>(first + i)) continue;
      dot += turned[i] * decode_coordinate(args.codec.key, record, first + i) * key_norm;
      if (known) dot += x[i] * map.first_key[at + i];
      value[i] = decode_coordinate(args.codec.value, values, first + i) * value_norm;
    }
    float score = warp_sum(dot) * a.scale * kLog2e;
    if (!exists) score = bits_to_float(0x7FC00000);  // NaN
    if (a.soft_cap > 0.0f)
      score = args.cap_out * (1.0f - 2.0f / (1.0f + exp2_fast(score * args.cap_in)));
    const float new_m = maximum(*m, score);
    const float old = exp2_fast(*m - new_m), weight = exp2_fast(score - new_m);
    *m = new_m;
    *l = *l * old + weight;
    for (int i = 0; i < kPerLane; ++i) {
      o[i] = o[i] * old + weight * value[i];
      means[i] *= old;
      if (known && holds<kHeadDim>(first + i)) means[i] += weight * map.first_value[at + i];
    }
  }
  rotate<kHeadDim>(args.codec, o, scratch, true);
  for (int i = 0; i < kPerLane; ++i) o[i] += means[i];
}

// Stores a row's state of the first tokens. `o` has the lane's coordinates.
template <int kHeadDim>
FQ_DEVICE void store_first(const AttendArgs& args, int64_t row, float m, float l,
                           const float (&o)[kLaneCoords<kHeadDim>]) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const int first = lane_idx() * kPerLane;
  for (int i = 0; i < kPerLane; ++i) {
    if (holds<kHeadDim>(first + i)) args.prepared.first_o[row * kHeadDim + first + i] = o[i];
  }
  if (lane_idx() == 0) {
    args.prepared.first_m[row] = m / kLog2e;
    args.prepared.first_l[row] = l;
  }
}

// grid [CTAs of kPrepareWarps rows, num_kv_heads].
template <int kHeadDim, int kMapped>
FQ_KERNEL(kPrepareWarps* kWarp, 1)
prepare(FQ_PARAM AttendArgs args) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const FqCudaKeyMap& map = args.map;
  const int kv_head = cta_idx().y, group = a.num_q_heads / args.pages.num_kv_heads;
  const int64_t number = (int64_t)cta_idx().x * kPrepareWarps + warp_idx();
  const int64_t token = number / group;
  if (token < a.query_start_loc[0] || token >= a.query_start_loc[a.num_reqs]) return;
  const int head = kv_head * group + (int)(number % group), first = lane_idx() * kPerLane;
  const int64_t row = token * a.num_q_heads + head;
  const int req = request_of(a, (int)token);
  const int query_begin = a.query_start_loc[req];
  const int context = a.seq_lens[req] - (a.query_start_loc[req + 1] - query_begin);
  const int position = context + (int)token - query_begin;

  float* own = reinterpret_cast<float*>(shared_memory()) + warp_idx() * 2 * kHeadDim;
  float* coded = own + kHeadDim;
  float x[kPerLane], turned[kPerLane], bias = 0.0f;
  const void* query = kMapped ? a.query : a.first_query;
  const int64_t stride_token = kMapped ? a.stride_query_token : a.stride_first_query_token;
  const int64_t stride_head = kMapped ? a.stride_query_head : a.stride_first_query_head;
  const int64_t from = token * stride_token + head * stride_head + first;
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = turned[i] = 0.0f;
    if (!holds<kHeadDim>(first + i)) continue;
    x[i] = turned[i] = load_element(query, from + i, a.dtype);
    if (kMapped) bias += x[i] * map.mean[kv_head * kHeadDim + first + i];
  }
  if (kMapped) bias = warp_sum(bias) * a.scale * kLog2e;
  rotate<kHeadDim>(args.codec, turned, own, false);
  float m, l, o[kPerLane];
  attend_first<kHeadDim, kMapped>(args, req, kv_head, context, position,
                                  args.has_raw ? context : position + 1, x, turned, own, &m, &l, o);
  if (!kMapped) {
    store_first<kHeadDim>(args, row, m, l, o);
    return;
  }

  // ---- the query in the keys' coordinates, and what it makes of cosines and sines
  sync_warp();
  for (int i = 0; i < kPerLane; ++i) {
    if (!holds<kHeadDim>(first + i)) continue;
    own[first + i] = x[i];
    coded[first + i] = turned[i];
  }
  sync_warp();
  if (map.query_matrix_t) {
    const int64_t matrix = (int64_t)kv_head * kHeadDim * map.num_coded;
    transform<kHeadDim>(map.query_matrix_t + matrix, map.num_coded, own, coded);
    sync_warp();
  }
  float peak = 0.0f;
  for (int c = lane_idx(); c < map.num_coded; c += kWarp) peak = maximum(peak, absolute(coded[c]));
  peak = warp_max(peak);
  const float inverse = peak >= kMinNormal ? 1.0f / peak : 0.0f;
  for (int c = lane_idx(); c < map.num_coded; c += kWarp)  // a NaN stays one
    args.prepared.query[row * kHeadDim + c] = (uint16_t)to_half2(coded[c] * inverse, 0.0f);
  for (int j = lane_idx(); j < map.num_turning; j += kWarp) {
    const TurnPair pair = load_turn(map, kv_head, j);
    const bool exists = pair.first >= 0;
    const float p = exists ? own[pair.first] : 0.0f, q = exists ? own[pair.second] : 0.0f;
    float* to = args.prepared.turns + (row * map.num_turning + j) * 2;
    to[0] = (p * pair.c0 + q * pair.c1) * a.scale * kLog2e;
    to[1] = (q * pair.c0 - p * pair.c1) * a.scale * kLog2e;
  }
  if (lane_idx() == 0) {
    args.prepared.constants[row * 2] = peak;
    args.prepared.constants[row * 2 + 1] = bias;
  }

  // ---- the first tokens' state, with that of raw new tokens; weights there are of natural scores
  if (args.has_raw) {
    const float raw_m = a.raw_m[row] * kLog2e, raw_l = a.raw_l[row], new_m = maximum(m, raw_m);
    const float old = exp2_fast(m - new_m), weight = exp2_fast(raw_m - new_m);
    m = new_m;
    l = l * old + raw_l * weight;
    for (int i = 0; i < kPerLane; ++i) {
      o[i] *= old;
      if (raw_l != 0.0f && holds<kHeadDim>(first + i))
        o[i] += a.raw_o[row * kHeadDim + first + i] * weight;
    }
  }
  store_first<kHeadDim>(args, row, m, l, o);
}

}  // namespace fq
