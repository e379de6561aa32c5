// SPDX-License-Identifier: Apache-2.0
// The nearest codeword of a subvector: argmax <y, c> - |c|^2 / 2, ties to the lowest index, among
// all rows of a code or among those that its nearest coarse cells list. Lanes are codewords.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fq::FQ_ISA {

// ---- all rows
// ------------------------------------------------------------------------------------

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
  vi row;
  for (int i = 0; i < kLanes; ++i) row[i] = i;
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
    float top = best[s][0];
    int32_t winner = best_row[s][0];
    for (int i = 1; i < kLanes; ++i) {
      if (best[s][i] > top || (best[s][i] == top && best_row[s][i] < winner)) {
        top = best[s][i];
        winner = best_row[s][i];
      }
    }
    index[s] = (uint32_t)winner;
  }
}

// ---- lists --------------------------------------------------------------------------------------

constexpr int kTileRows = 16;  // rows of a tile: [subvec_dim + 1, 16] floats, the first -|c|^2 / 2
constexpr int kPerTile = kTileRows / kLanes;
constexpr int kMaxCells = 256;

// Scores of a tile's 16 rows, rounded as in the exhaustive search.
static inline void score_tile(const float* tile, int dim, const vf* coords, vf* score) {
  for (int v = 0; v < kPerTile; ++v) score[v] = load(tile + v * kLanes);
  for (int j = 0; j < dim; ++j) {
    tile += kTileRows;
    for (int v = 0; v < kPerTile; ++v)
      score[v] = madd(load(tile + v * kLanes), coords[j], score[v]);
  }
}

// Takes the (score, index) pairs that are better, or as good and of a lower index.
static inline void keep_better(vf score, vi index, vf& best, vi& best_index) {
  const vi better = (score > best) | ((score == best) & (index < best_index));
  best = better ? score : best;
  best_index = better ? index : best_index;
}

// Number of the best of `count` scores, a multiple of 16; the lowest of equals.
static inline int best_of(const float* score, int count) {
  vf best = load(score);
  for (int i = kLanes; i < count; i += kLanes) best = vmax(best, load(score + i));
  const float top = max_lane(best);
  int at = 0;
  while (score[at] != top) ++at;
  return at;
}

// The nearest row of one subvector y among the lists of its code.num_lists nearest cells.
// A list's rows ascend, so within it the first of equals has the lowest index.
template <int kDim>
static inline uint32_t nearest_listed(const FqCode& code, const float* y) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int tile_size = (dim + 1) * kTileRows;
  const int num_cells = (code.num_cells + kTileRows - 1) / kTileRows * kTileRows;
  vf coords[kDim ? kDim : 64];
  for (int j = 0; j < dim; ++j) coords[j] = splat(y[j]);

  alignas(64) float cell_score[kMaxCells];
  for (int cell = 0; cell < num_cells; cell += kTileRows) {
    vf score[kPerTile];
    score_tile(code.cell_tiles + (int64_t)(cell / kTileRows) * tile_size, dim, coords, score);
    for (int v = 0; v < kPerTile; ++v) store(cell_score + cell + v * kLanes, score[v]);
  }

  vf best = splat(kMinusInf);
  vi best_index = vi{};
  for (int l = 0; l < code.num_lists; ++l) {
    const int cell = best_of(cell_score, num_cells);
    cell_score[cell] = kMinusInf;
    vf list_best[kPerTile];
    vi list_index[kPerTile];
    for (int v = 0; v < kPerTile; ++v) {
      list_best[v] = splat(kMinusInf);
      list_index[v] = vi{};
    }
    for (int t = code.list_begin[cell]; t < code.list_begin[cell + 1]; ++t) {
      vf score[kPerTile];
      score_tile(code.list_tiles + (int64_t)t * tile_size, dim, coords, score);
      for (int v = 0; v < kPerTile; ++v) {
        vi index;
        memcpy(&index, code.list_index + (int64_t)t * kTileRows + v * kLanes, sizeof(index));
        const vi better = score[v] > list_best[v];
        list_best[v] = vmax(score[v], list_best[v]);
        list_index[v] = better ? index : list_index[v];
      }
    }
    for (int v = 0; v < kPerTile; ++v) keep_better(list_best[v], list_index[v], best, best_index);
  }
  const float top = max_lane(best);
  int32_t winner = INT32_MAX;
  for (int i = 0; i < kLanes; ++i) {
    if (best[i] == top && best_index[i] < winner) winner = best_index[i];
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
