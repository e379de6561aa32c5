// SPDX-License-Identifier: Apache-2.0
// Encodes tokens through a calibration's map of keys: first tokens, and the transform.
#pragma once

#include "cpu/batch.h"
#include "cpu/mapped.h"

namespace fq::FQ_ISA {

// Whether a token is among its request's first ones, which a map of keys codes in another way.
static inline bool is_first(const FqEncode& args, int64_t token) {
  return args.key_map && args.positions[token] < args.key_map->num_plain;
}

// Subtracts from x what keys, or values, at a first position have in common, if that is known.
static inline void subtract_first(const FqKeyMap& map, const float* means, int head, int head_dim,
                                  int64_t position, float* x) {
  if (position >= map.num_first_means) return;
  subtract(x, means + (head * (int64_t)map.num_first_means + position) * head_dim, head_dim);
}

// b.y [count, num_coded], of keys b.x without their means: their transformed directions, times
// source_scale. Those of zero vectors are 0, as are those with a NaN or infinity, whose number is
// returned.
static int64_t transform_keys(const FqKeyMap& map, int head_dim, Batch& b) {
  int64_t nonfinite = 0;
  for (int i = 0; i < b.count; ++i) {
    b.size[i].peak = peak(b.x + (int64_t)i * head_dim, head_dim);
  }
  for (int i = 0; i < b.count; ++i) {
    float* x = b.x + (int64_t)i * head_dim;
    const float largest = b.size[i].peak;
    const bool is_finite = largest != __builtin_inff();
    nonfinite += !is_finite;
    b.size[i].peak = is_finite && largest >= kMinNormal ? largest : 0.0f;
    if (b.size[i].peak > 0.0f) {
      divide(x, head_dim, largest);
    } else {
      memset(x, 0, (size_t)head_dim * 4);
    }
  }
  const int num_coded = map.num_coded;
  for (int i = 0, next; i < b.count; i = next) {  // keys of one head
    for (next = i + 1; next < b.count && b.head[next] == b.head[i];) ++next;
    if (next == i + 1 && map.key_halves_t) {
      multiply_halves(map.key_halves_t + (int64_t)b.head[i] * head_dim / 2 * num_coded, head_dim,
                      num_coded, b.x + (int64_t)i * head_dim, b.y + (int64_t)i * num_coded);
      continue;
    }
    multiply_transposed(matrix_of(map, map.key_matrix_t, b.head[i], head_dim), head_dim, num_coded,
                        next - i, b.x + (int64_t)i * head_dim, b.y + (int64_t)i * num_coded);
  }
  normalise(b.count, num_coded, b.y, b.size, b.parts);
  const vf source_scale = splat(map.source_scale);
  for (int j = 0; j < b.count * num_coded; j += kLanes) {
    store(b.y + j, load(b.y + j) * source_scale);
  }
  return nonfinite;
}

// Codes the run of subvectors of b.y that begins at coordinate `at`, index bytes to byte `offset`
// of the records; b.decoded gets what they stand for. Returns the coordinate behind the run.
template <int kDim>
static inline int encode_run(const FqCode& code, int num_coded, int num_subvecs, int at, int offset,
                             Batch& b) {
  const int length = num_subvecs * kDim;
  for (int i = 0; i < b.count; ++i) {
    memcpy(b.run + i * length, b.y + (int64_t)i * num_coded + at, (size_t)length * 4);
  }
  nearest_all<kDim>(code, b.count * num_subvecs, b.run, b.index);
  for (int i = 0; i < b.count; ++i) {
    const uint32_t* index = b.index + i * num_subvecs;
    copy_rows<kDim>(code, index, num_subvecs, b.decoded + (int64_t)i * num_coded + at);
    if (!(b.size[i].length > 0.0f)) continue;  // the zero vector's field stays 0
    to_bytes(index, num_subvecs, b.record[i] + offset);
  }
  return at + length;
}

// The partial sums of <y, v> and of |v|^2, weighted, both [num_coded]: [2, 16].
static inline void weighted_sums(const float* weight, const float* y, const float* v, int num_coded,
                                 float* parts) {
  Sum16 dots, squares;
  for (int i = 0; i < num_coded; i += kUnit) {
    for (int c = 0; c < kPerUnit; ++c) {
      const int at = i + c * kLanes;
      const vf w = load(weight + at), decoded = load(v + at);
      dots.add(c, w * load(y + at) * decoded);
      squares.add(c, w * decoded * decoded);
    }
  }
  dots.store_to(parts);
  squares.store_to(parts + 16);
}

// Encodes keys b.x (overwritten), without their means, through the transform into zeroed records
// and norms. A key with a NaN or infinity is stored as the zero vector; returns their number.
static int64_t encode_transformed(const FqKeyMap& map, int head_dim, int offset, Batch& b) {
  const int64_t nonfinite = transform_keys(map, head_dim, b);
  const int num_coded = map.num_coded;
  const int32_t* num = map.num_subvecs;
  int end = encode_run<2>(map.codes[0], num_coded, num[0], 0, offset, b);
  end = encode_run<4>(map.codes[1], num_coded, num[1], end, offset + num[0], b);
  end = encode_run<8>(map.codes[2], num_coded, num[2], end, offset + num[0] + num[1], b);
  for (int i = 0; i < b.count; ++i) {
    float* v = b.decoded + (int64_t)i * num_coded;
    for (int j = end; j < num_coded; ++j) v[j] = 0.0f;
    weighted_sums(map.weight + (int64_t)b.head[i] * num_coded, b.y + (int64_t)i * num_coded, v,
                  num_coded, b.parts + 32 * i);
  }
  for (int i = 0; i < b.count; ++i) {
    b.norm[0][i] = 0;
    if (!(b.size[i].length > 0.0f)) continue;
    // The gain of least weighted error of a direction y decoded as v.
    const float dot = total(b.parts + 32 * i), square = total(b.parts + 32 * i + 16);
    const float gain = fmax2(dot, 0.0f) / fmax2(square, 1e-12f);
    const float stored = gain * b.size[i].length / map.source_scale * b.size[i].peak;
    b.norm[0][i] = float_to_half(stored < 65504.0f ? stored : 65504.0f);
  }
  return nonfinite;
}

}  // namespace fq::FQ_ISA
