// SPDX-License-Identifier: Apache-2.0
// What a map of keys adds to the attention of a request's first tokens (FqKeyMap::num_plain): their
// keys and values were coded without what first tokens have in common.
#pragma once

#include "cpu/job.h"

namespace fq::FQ_ISA {

// What a row block's first tokens have from the map's means of them: s.first_value, rotated, and
// s.first_bias, what those of keys add to each row's scores.
static void load_first_means(const Call& call, const RowBlock& b, const Scratch& s) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, group = call.group_size;
  const int num_means = a.key_map->num_first_means;
  const int64_t at = (int64_t)b.kv_head * num_means * head_dim;
  for (int p = 0; p < num_means; ++p) {
    float* mean = s.first_value + p * head_dim;
    memcpy(mean, a.key_map->first_value + at + p * head_dim, (size_t)head_dim * 4);
    rotate(call.codec, mean, false);
  }
  const int64_t token = a.batch->query_start_loc[b.req] + b.token;
  for (int r = 0; r < rows_of(call, b); ++r) {
    alignas(64) float q[kMaxHeadDim];
    const int head = b.kv_head * group + r % group;
    load_row(a.query, (token + r / group) * a.stride_query_token + head * a.stride_query_head,
             a.dtype, head_dim, q);
    for (int p = 0; p < num_means; ++p) {
      s.first_bias[r * kMaxFirstMeans + p] =
          a.scale * dot(q, a.key_map->first_key + at + p * head_dim, head_dim);
    }
  }
}

// What the map of keys adds to the scores of a tile that has first tokens: s.first_biases, where
// `biases` and `bias` are those of its other tokens.
static void set_first_biases(const FqKeyMap& map, int t0, int count, int rows, const float* bias,
                             const float* biases, const Scratch& s) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < count; ++i) {
      const int position = t0 + i;
      float& x = s.first_biases[r * kMaxTile + i];
      if (position < map.num_first_means) {
        x = s.first_bias[r * kMaxFirstMeans + position];
      } else if (position < map.num_plain) {
        x = 0.0f;
      } else {
        x = biases ? biases[r * kMaxTile + i] : bias ? bias[r] : 0.0f;
      }
    }
  }
}

// Adds the means of first values, by weights without value factors, and gives the weights these.
static void add_first_values(int num_means, int count, int rows, int head_dim, const Scratch& s,
                             const State& state) {
  axpy_tile(s.scores, s.alpha, rows, DenseTile{s.first_value, head_dim}, head_dim,
            num_means < count ? num_means : count, state.o);
  for (int r = 0; r < rows; ++r) {
    s.alpha[r] = 1.0f;
    for (int i = 0; i < count; ++i) s.scores[r * kMaxTile + i] *= s.value_factor[i];
  }
}

}  // namespace fq::FQ_ISA
