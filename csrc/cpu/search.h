// SPDX-License-Identifier: Apache-2.0
// The nearest codeword of a subvector: argmax <y, c> - |c|^2 / 2, ties to the lowest index, among
// all rows of a code or among those that its nearest coarse cells list. Lanes are codewords.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

// ---- the best lane -----------------------------------------------------------------------------

// Takes the (score, index) pairs that are better, or as good and of a lower index.
static inline void keep_better(vf score, vi index, vf& best, vi& best_index) {
  const vi better = (score > best) | ((score == best) & (index < best_index));
  best = better ? score : best;
  best_index = better ? index : best_index;
}

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
constexpr int kPerTile = kTileRows / kLanes;
constexpr int kMaxCells = 256;

// Scores of a tile's 16 rows, rounded as in the exhaustive search.
template <int kDim>
static inline void score_tile(const float* tile, int any_dim, const vf* coords, vf* score) {
  const int dim = kDim ? kDim : any_dim;
  for (int v = 0; v < kPerTile; ++v) score[v] = load(tile + v * kLanes);
  for (int j = 0; j < dim; ++j) {
    tile += kTileRows;
    for (int v = 0; v < kPerTile; ++v)
      score[v] = madd(load(tile + v * kLanes), coords[j], score[v]);
  }
}

// The best of `count` tiles: its position, the lowest of equals, and its score.
template <int kDim>
static inline int32_t best_in_tiles(const float* tiles, int count, int any_dim, const vf* coords,
                                    float* top) {
  const int dim = kDim ? kDim : any_dim;
  vf best[kPerTile];
  vi best_at[kPerTile], at[kPerTile];
  for (int v = 0; v < kPerTile; ++v) {
    best[v] = splat(kMinusInf);
    best_at[v] = vi{};
    at[v] = lane_numbers() + v * kLanes;
  }
  for (int t = 0; t < count; ++t, tiles += (dim + 1) * kTileRows) {
    vf score[kPerTile];
    score_tile<kDim>(tiles, dim, coords, score);
    for (int v = 0; v < kPerTile; ++v) {
      const vi better = score[v] > best[v];
      best[v] = vmax(score[v], best[v]);
      best_at[v] = better ? at[v] : best_at[v];
      at[v] += kTileRows;
    }
  }
  for (int v = 1; v < kPerTile; ++v) keep_better(best[v], best_at[v], best[0], best_at[0]);
  return best_lane(best[0], best_at[0], top);
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

// The nearest row of one subvector y among the lists of its code.num_lists nearest cells.
// A list's rows ascend, so the first of equals in it has the lowest index.
template <int kDim>
static inline uint32_t nearest_listed(const FqCode& code, const float* y) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int64_t tile_size = (dim + 1) * kTileRows;
  const int num_cell_tiles = (code.num_cells + kTileRows - 1) / kTileRows;
  vf coords[kDim ? kDim : 64];
  for (int j = 0; j < dim; ++j) coords[j] = splat(y[j]);

  float best = kMinusInf;
  int32_t winner = INT32_MAX;
  const auto search_list = [&](int cell) {
    const int64_t begin = code.list_begin[cell];
    float top;
    const int32_t at =
        best_in_tiles<kDim>(code.list_tiles + begin * tile_size,
                            code.list_begin[cell + 1] - (int)begin, dim, coords, &top);
    const int32_t row = code.list_index[begin * kTileRows + at];
    if (top > best || (top == best && row < winner)) {
      best = top;
      winner = row;
    }
  };
  if (code.num_lists == 1) {
    float top;
    search_list(best_in_tiles<kDim>(code.cell_tiles, num_cell_tiles, dim, coords, &top));
    return (uint32_t)winner;
  }
  alignas(64) float cell_score[kMaxCells];
  for (int t = 0; t < num_cell_tiles; ++t) {
    vf score[kPerTile];
    score_tile<kDim>(code.cell_tiles + t * tile_size, dim, coords, score);
    for (int v = 0; v < kPerTile; ++v) store(cell_score + t * kTileRows + v * kLanes, score[v]);
  }
  for (int n = 0; n < code.num_lists; ++n) {
    const int32_t cell = best_of(cell_score, num_cell_tiles * kTileRows);
    cell_score[cell] = kMinusInf;
    search_list(cell);
  }
  return (uint32_t)winner;
}

// ---- all subvectors of a vector -----------------------------------------------------------------

template <int kDim>
static inline void nearest_all(const FqCode& code, int num_subvecs, const float* y,
                               uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  int s = 0;
  if (code.num_cells) {
    for (; s < num_subvecs; ++s) index[s] = nearest_listed<kDim>(code, y + s * dim);
  }
  for (; s + 4 <= num_subvecs; s += 4) nearest<kDim, 4>(code, y + s * dim, index + s);
  for (; s < num_subvecs; ++s) nearest<kDim, 1>(code, y + s * dim, index + s);
}

}  // namespace fq::FQ_ISA
