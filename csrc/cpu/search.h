// SPDX-License-Identifier: Apache-2.0
// The nearest codeword of a subvector: argmax <y, c> - |c|^2 / 2, ties to the lowest index, among
// all rows of a code or among those that its nearest coarse cells list. Lanes are codewords.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

// ---- the best lane -----------------------------------------------------------------------------

template <int kHalf>
static inline vi min_with_swapped(vi x) {
  vi swap;
  for (int i = 0; i < kLanes; ++i) swap[i] = i ^ kHalf;
  const vi other = __builtin_shuffle(x, swap);
  return x < other ? x : other;
}

// Index of the best lane, the lowest of equals, and its score.
static inline int32_t best_lane(vf score, vi index, float* top) {
  *top = max_lane(score);
  vi x = score == *top ? index : vi{} + INT32_MAX;
  x = min_with_swapped<1>(x);
  x = min_with_swapped<2>(x);
  if constexpr (kLanes >= 8) x = min_with_swapped<4>(x);
  if constexpr (kLanes >= 16) x = min_with_swapped<8>(x);
  return x[0];
}

static inline vi lane_numbers() {
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// ---- all rows ----------------------------------------------------------------------------------

// Nearest codewords of kCount subvectors y, each at stride `dim`.
template <int kDim, int kCount>
static inline void nearest(const FqCode& code, const float* y, uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int num_rows = code.num_rows_padded;
  vf coords[kCount][kDim ? kDim : 64];
  vf best[kCount];
  vi best_row[kCount];
  for (int s = 0; s < kCount; ++s) {
    for (int j = 0; j < dim; ++j) coords[s][j] = splat(y[s * dim + j]);
    best[s] = splat(kMinusInf);
    best_row[s] = vi{};
  }
  vi row = lane_numbers();
  for (int n = 0; n < num_rows; n += kLanes, row += kLanes) {
    const vf minus_half_sq = -load(code.half_sq + n);
    vf score[kCount];
    for (int s = 0; s < kCount; ++s) score[s] = minus_half_sq;
    for (int j = 0; j < dim; ++j) {
      const vf c = load(code.rows_t + (int64_t)j * num_rows + n);
      for (int s = 0; s < kCount; ++s) score[s] = madd(c, coords[s][j], score[s]);
    }
    for (int s = 0; s < kCount; ++s) {
      const vi better = score[s] > best[s];
      best[s] = vmax(score[s], best[s]);
      best_row[s] = better ? row : best_row[s];
    }
  }
  for (int s = 0; s < kCount; ++s) {
    float top;
    index[s] = (uint32_t)best_lane(best[s], best_row[s], &top);
  }
}

// ---- lists --------------------------------------------------------------------------------------

constexpr int kTileRows = 16;  // rows of a tile: [subvec_dim + 1, 16] floats, the first -|c|^2 / 2
constexpr int kMaxCells = 256;

// For kCount subvectors the best of `count` tiles: its position, the lowest of equals, and its
// score, rounded as in the exhaustive search. With `scores`, [kCount, kMaxCells], also every score.
template <int kDim, int kCount>
static inline void best_in_tiles(const float* tiles, int count, int any_dim,
                                 const vf (*coords)[kDim ? kDim : 64], int32_t* best_at, float* top,
                                 float* scores = nullptr) {
  const int dim = kDim ? kDim : any_dim;
  vf best[kCount];
  vi at[kCount];
  for (int s = 0; s < kCount; ++s) {
    best[s] = splat(kMinusInf);
    at[s] = vi{};
  }
  vi position = lane_numbers();
  for (int t = 0; t < count; ++t, tiles += (dim + 1) * kTileRows) {
    for (int v = 0; v < kTileRows; v += kLanes, position += kLanes) {
      vf score[kCount];
      for (int s = 0; s < kCount; ++s) score[s] = load(tiles + v);
      for (int j = 0; j < dim; ++j) {
        const vf c = load(tiles + (j + 1) * kTileRows + v);
        for (int s = 0; s < kCount; ++s) score[s] = madd(c, coords[s][j], score[s]);
      }
      for (int s = 0; s < kCount; ++s) {
        const vi better = score[s] > best[s];
        best[s] = vmax(score[s], best[s]);
        at[s] = better ? position : at[s];
        if (scores) store(scores + s * kMaxCells + t * kTileRows + v, score[s]);
      }
    }
  }
  for (int s = 0; s < kCount; ++s) best_at[s] = best_lane(best[s], at[s], top + s);
}

// Position of the best of `count` scores, a multiple of 16; the lowest of equals.
static inline int32_t best_of(const float* scores, int count) {
  vf best = splat(kMinusInf);
  vi best_at = vi{}, at = lane_numbers();
  for (int i = 0; i < count; i += kLanes, at += kLanes) {
    const vf score = load(scores + i);
    const vi better = score > best;
    best = vmax(score, best);
    best_at = better ? at : best_at;
  }
  float top;
  return best_lane(best, best_at, &top);
}

// The nearest rows of kCount subvectors y among the lists of their code.num_lists nearest cells.
// A list's rows ascend, so the first of equals in it has the lowest index.
template <int kDim, int kCount>
static inline void nearest_listed(const FqCode& code, const float* y, uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int64_t tile_size = (dim + 1) * kTileRows;
  const int num_cell_tiles = (code.num_cells + kTileRows - 1) / kTileRows;
  vf coords[kCount][kDim ? kDim : 64];
  for (int s = 0; s < kCount; ++s) {
    for (int j = 0; j < dim; ++j) coords[s][j] = splat(y[s * dim + j]);
  }
  alignas(64) float cell_scores[kCount][kMaxCells];
  int32_t cell[kCount];
  float top[kCount];
  best_in_tiles<kDim, kCount>(code.cell_tiles, num_cell_tiles, dim, coords, cell, top,
                              code.num_lists > 1 ? cell_scores[0] : nullptr);
  for (int s = 0; s < kCount; ++s) {
    float best = kMinusInf;
    int32_t winner = INT32_MAX;
    for (int n = 0;;) {
      const int begin = code.list_begin[cell[s]], end = code.list_begin[cell[s] + 1];
      int32_t at;
      best_in_tiles<kDim, 1>(code.list_tiles + begin * tile_size, end - begin, dim, coords + s, &at,
                             top);
      const int32_t row = code.list_index[(int64_t)begin * kTileRows + at];
      if (top[0] > best || (top[0] == best && row < winner)) {
        best = top[0];
        winner = row;
      }
      if (++n == code.num_lists) break;
      cell_scores[s][cell[s]] = kMinusInf;
      cell[s] = best_of(cell_scores[s], num_cell_tiles * kTileRows);
    }
    index[s] = (uint32_t)winner;
  }
}

// ---- all subvectors of a vector -----------------------------------------------------------------

template <int kDim>
static inline void nearest_all(const FqCode& code, int num_subvecs, const float* y,
                               uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  int s = 0;
  if (code.num_cells) {
    for (; s + 4 <= num_subvecs; s += 4) nearest_listed<kDim, 4>(code, y + s * dim, index + s);
    for (; s < num_subvecs; ++s) nearest_listed<kDim, 1>(code, y + s * dim, index + s);
  }
  for (; s + 4 <= num_subvecs; s += 4) nearest<kDim, 4>(code, y + s * dim, index + s);
  for (; s < num_subvecs; ++s) nearest<kDim, 1>(code, y + s * dim, index + s);
}

}  // namespace fq::FQ_ISA
