// SPDX-License-Identifier: Apache-2.0
// Keys coded through a map (FqKeyMap): without their mean, and with a transform as a product code
// whose subvectors are the shorter the more their coordinates matter.
#pragma once

#include "cpu/codec.h"
#include "cpu/tile.h"

namespace fq::FQ_ISA {

static inline const float* matrix_of(const FqKeyMap& map, const float* matrices, int head,
                                     int head_dim) {
  return matrices + (int64_t)head * head_dim * map.num_coded;
}

constexpr int kStep = 32;         // positions of a row of turn_coarse
constexpr int kHalf = kStep / 2;  // distances from the middle of a step: 0.5, 1.5, .. of turn_fine
static_assert(kStep == kMaxTile);

// The cosines and sines by which coordinates turn at one position.
struct Turned {
  int64_t position = -1;
  float cosine[kMaxHeadDim], sine[kMaxHeadDim];
};

static inline void turn_to(const FqKeyMap& map, int head_dim, int64_t position, Turned& turned) {
  if (turned.position == position) return;
  turned.position = position;
  const int i = (int)(position % kStep), n = map.num_fast_columns, all = map.num_columns;
  const float* fine = map.turn_fine + (i < kHalf ? kHalf - 1 - i : i - kHalf);
  const float* coarse = map.turn_coarse + position / kStep * 2 * all;
  float cosines[kMaxHeadDim / 2 + 32], sines[kMaxHeadDim / 2 + 32];
  for (int c = 0; c < n; ++c) {
    const float cos1 = coarse[c], sin1 = coarse[all + c];
    const float cos2 = fine[c * kHalf], size2 = fine[(n + c) * kHalf];
    const float sin2 = i < kHalf ? -size2 : size2;
    cosines[c] = cos1 * cos2 - sin1 * sin2;
    sines[c] = sin1 * cos2 + cos1 * sin2;
  }
  for (int c = n; c < all; ++c) {
    cosines[c] = coarse[c];
    sines[c] = coarse[all + c];
  }
  for (int j = 0; j < head_dim; ++j) {
    turned.cosine[j] = cosines[map.turn_columns[j]];
    turned.sine[j] = sines[map.turn_columns[j]];
  }
}

// Subtracts R_p c of one head from x.
static inline void subtract_turning(const FqKeyMap& map, int head, int head_dim,
                                    const Turned& turned, float* x) {
  const float* of_cosine = map.turn_dense + (int64_t)head * 2 * head_dim;
  const float* of_sine = of_cosine + head_dim;
  for (int i = 0; i < head_dim; i += kLanes) {
    const vf turning =
        load(of_cosine + i) * load(turned.cosine + i) - load(of_sine + i) * load(turned.sine + i);
    store(x + i, load(x + i) - turning);
  }
}

// What a query q [head_dim] makes of R_p c: factors of the cosines of all columns, then of the
// sines, most of them 0.
static inline void turning_weights(const FqKeyMap& map, int head, float scale, const float* q,
                                   float* weights) {
  const int n = map.num_turning;
  const int32_t* pair = map.turn_pairs + (int64_t)head * n * 3;
  const float* c = map.turn_mean + (int64_t)head * n * 2;
  memset(weights, 0, (size_t)map.num_columns * 8);
  for (int j = 0; j < n; ++j, pair += 3, c += 2) {
    const float a = q[pair[0]], b = q[pair[1]];
    weights[pair[2]] = scale * (a * c[0] + b * c[1]);
    weights[map.num_columns + pair[2]] = scale * (b * c[0] - a * c[1]);
  }
}

// The weights of fast columns for positions counted from the middle of a step, whose row of
// turn_coarse is `coarse`: [kRows, 2, num_fast_columns]. step_bias[r] is the sum of bias[r] and
// what slow columns add to all of the step.
template <int kRows>
static inline void turn_weights(const FqKeyMap& map, const float* coarse, const float* weights,
                                const float* bias, float* turned, float* step_bias) {
  const int n = map.num_columns, num_fast = map.num_fast_columns;
  for (int i = 0; i < num_fast; i += kLanes) {
    const vf cosine = load(coarse + i), sine = load(coarse + n + i);
    for (int r = 0; r < kRows; ++r) {
      const vf x = load(weights + r * 2 * n + i), y = load(weights + r * 2 * n + n + i);
      store(turned + r * 2 * num_fast + i, madd(x, cosine, y * sine));
      store(turned + r * 2 * num_fast + num_fast + i, y * cosine - x * sine);
    }
  }
  vf slow[4] = {};
  for (int i = num_fast; i < n; i += kLanes) {
    const vf cosine = load(coarse + i), sine = load(coarse + n + i);
    for (int r = 0; r < kRows; ++r) {
      slow[r] = madd(load(weights + r * 2 * n + i), cosine, slow[r]);
      slow[r] = madd(load(weights + r * 2 * n + n + i), sine, slow[r]);
    }
  }
  const v4 sums = sum4(slow[0], slow[1], slow[2], slow[3]);
  for (int r = 0; r < kRows; ++r) step_bias[r] = bias[r] + sums[r];
}

static inline vf reversed(vf x) {
  vi order;
  for (int i = 0; i < kLanes; ++i) order[i] = kLanes - 1 - i;
  return __builtin_shuffle(x, order);
}

// out[r][i] = bias[r] + the score of R_p c for the positions of a step. Cosines are the same on
// both sides of its middle, and sines but for their sign. `turned` is scratch, [kRows, 2,
// num_fast_columns].
template <int kRows>
static inline void turning_rows(const FqKeyMap& map, const int32_t* pair, const float* coarse,
                                const float* weights, const float* bias, float* turned,
                                float* out) {
  float step_bias[kRows];
  turn_weights<kRows>(map, coarse, weights, bias, turned, step_bias);
  constexpr int kVectors = kHalf / kLanes;
  const int n = map.num_fast_columns;
  // Few rows' sums of cosines and of sines side by side: each alone would wait for itself.
  constexpr int kParts = kRows * kVectors <= 4 ? 2 : 1;
  vf sums[2][kRows][kVectors];
  for (int first = 0; first < 2; first += kParts) {  // cosines, sines
    vf acc[kParts][kRows][kVectors];
    for (int p = 0; p < kParts; ++p) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          acc[p][r][v] = first + p ? vf{} : splat(step_bias[r]);
        }
      }
    }
    for (int j = 0; j < map.num_fast; ++j) {
      for (int p = 0; p < kParts; ++p) {
        const int column = (first + p) * n + pair[3 * j + 2];
        const float* fine = map.turn_fine + column * kHalf;
        for (int r = 0; r < kRows; ++r) {
          const vf w = splat(turned[r * 2 * n + column]);
          for (int v = 0; v < kVectors; ++v) {
            acc[p][r][v] = madd(w, load(fine + v * kLanes), acc[p][r][v]);
          }
        }
      }
    }
    memcpy(sums[first], acc, sizeof(acc));
  }
  for (int r = 0; r < kRows; ++r, out += kStep) {
    for (int v = 0; v < kVectors; ++v) {
      const vf even = sums[0][r][v], odd = sums[1][r][v];
      store(out + kHalf + v * kLanes, even + odd);
      store(out + kHalf - (v + 1) * kLanes, reversed(even - odd));
    }
  }
}

// What every score of a step has beside the code's part: [rows, kStep]. `turned` is scratch, [4, 2,
// num_fast_columns].
static void turning_step(const FqKeyMap& map, int head, const float* weights, const float* bias,
                         int rows, int64_t step, float* turned, float* out) {
  const int n = 2 * map.num_columns;
  const float* coarse = map.turn_coarse + step * n;
  const int32_t* pair = map.turn_pairs + (int64_t)head * map.num_turning * 3;
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    turning_rows<4>(map, pair, coarse, weights + r * n, bias + r, turned, out + r * kStep);
  }
  weights += r * n;
  bias += r;
  out += r * kStep;
  if (rows - r == 3) turning_rows<3>(map, pair, coarse, weights, bias, turned, out);
  if (rows - r == 2) turning_rows<2>(map, pair, coarse, weights, bias, turned, out);
  if (rows - r == 1) turning_rows<1>(map, pair, coarse, weights, bias, turned, out);
}

// Subtracts the mean of a head's keys from x [head_dim].
static inline void subtract_mean(const FqKeyMap& map, int head, int head_dim, int64_t position,
                                 Turned& turned, float* x) {
  subtract(x, map.mean + (int64_t)head * head_dim, head_dim);
  if (!map.turn_fine) return;
  turn_to(map, head_dim, position, turned);
  subtract_turning(map, head, head_dim, turned, x);
}

template <int kDim>
static inline float* decode_run(const FqCode& code, int num_subvecs, const uint8_t* field,
                                float* dst) {
  for (int s = 0; s < num_subvecs; ++s, dst += kDim) {
    memcpy(dst, code.rows + field[s] * kDim, kDim * 4);
  }
  return dst;
}

// Writes the directions of `count` transformed keys, [count, num_coded] floats.
static void decode_mapped(const FqKeyMap& map, const uint8_t* const* fields, int count,
                          float* dst) {
  const int32_t* num = map.num_subvecs;
  for (int t = 0; t < count; ++t) {
    const uint8_t* field = fields[t];
    float* end = dst + map.num_coded;
    dst = decode_run<2>(map.codes[0], num[0], field, dst);
    dst = decode_run<4>(map.codes[1], num[1], field + num[0], dst);
    dst = decode_run<8>(map.codes[2], num[2], field + num[0] + num[1], dst);
    while (dst < end) *dst++ = 0.0f;
  }
}

// Scores of a tile of transformed keys for queries [rows, num_coded]; as dot_codes.
static void dot_mapped(const FqKeyMap& map, const uint8_t* const* fields, const float* q, int rows,
                       int num_tokens, float* scratch, float* scores) {
  const int dim = map.num_coded, end2 = 2 * map.num_subvecs[0];
  const int end4 = end2 + 4 * map.num_subvecs[1];
  const size_t at4 = (size_t)map.num_subvecs[0], at8 = at4 + (size_t)map.num_subvecs[1];
  const bool is_aligned =
      end2 % kUnit == 0 && end4 % kUnit == 0 && end4 + 8 * map.num_subvecs[2] == dim;
  if (is_aligned && rows <= kMaxFusedRows) {
    const auto dot = [&](auto tile) {
      tile.part2 = {{map.codes[0].rows}, fields, 0};
      tile.part4 = {{map.codes[1].rows}, fields, at4};
      tile.part8 = {{map.codes[2].rows}, fields, at8};
      tile.end2 = end2;
      tile.end4 = end4;
      dot_tile(q, rows, tile, dim, num_tokens, scores);
    };
    // The runs of 2 and 3 bits at the usual head_dims.
    if (dim == 64 && end2 == 16 && end4 == 32) return dot(MappedTile<1, 1, 2>{});
    if (dim == 64 && end2 == 32 && end4 == 64) return dot(MappedTile<2, 2, 0>{});
    if (dim == 128 && end2 == 32 && end4 == 64) return dot(MappedTile<2, 2, 4>{});
    if (dim == 128 && end2 == 64 && end4 == 128) return dot(MappedTile<4, 4, 0>{});
    return dot(MappedTile<0, 0, 0>{});
  }
  if (is_aligned) {
    decode_part<Codes<2, false>>(map.codes[0], end2, fields, 0, num_tokens, scratch, dim);
    decode_part<Codes<4, false>>(map.codes[1], end4 - end2, fields, at4, num_tokens, scratch + end2,
                                 dim);
    decode_part<Codes<8, false>>(map.codes[2], dim - end4, fields, at8, num_tokens, scratch + end4,
                                 dim);
  } else {
    decode_mapped(map, fields, num_tokens, scratch);
  }
  dot_tile(q, rows, DenseTile{scratch, dim}, dim, num_tokens, scores);
}

}  // namespace fq::FQ_ISA
