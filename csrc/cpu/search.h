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
  constexpr int kVectors = kLanes < kTileRows ? 2 : 1;  // scored together
  const int dim = kDim ? kDim : any_dim;
  vf best[kCount];
  vi at[kCount];
  for (int s = 0; s < kCount; ++s) {
    best[s] = splat(kMinusInf);
    at[s] = vi{};
  }
  vi position = lane_numbers();
  for (int t = 0; t < count; ++t, tiles += (dim + 1) * kTileRows) {
    for (int first = 0; first < kTileRows; first += kVectors * kLanes) {
      vf score[kCount][kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const vf minus_half_sq = load(tiles + first + v * kLanes);
        for (int s = 0; s < kCount; ++s) score[s][v] = minus_half_sq;
      }
      for (int j = 0; j < dim; ++j) {
        const float* row = tiles + (j + 1) * kTileRows + first;
        vf c[kVectors];
        for (int v = 0; v < kVectors; ++v) c[v] = load(row + v * kLanes);
        for (int s = 0; s < kCount; ++s) {
          const vf x = in_register(coords[s][j]);
          for (int v = 0; v < kVectors; ++v) score[s][v] = madd(c[v], x, score[s][v]);
        }
      }
      for (int v = 0; v < kVectors; ++v, position += kLanes) {
        for (int s = 0; s < kCount; ++s) {
          const vi better = score[s][v] > best[s];
          best[s] = vmax(score[s][v], best[s]);
          at[s] = better ? position : at[s];
          if (scores)
            store(scores + s * kMaxCells + t * kTileRows + first + v * kLanes, score[s][v]);
        }
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

template <int kDim, int kCount>
static inline void splat_coords(const float* const* y, int dim, vf (*coords)[kDim ? kDim : 64]) {
  for (int s = 0; s < kCount; ++s) {
    for (int j = 0; j < dim; ++j) coords[s][j] = splat(y[s][j]);
  }
}

// What subvectors, and which of their nearest cells, are searched together.
constexpr int kMaxPairs = 4096;
struct Pairs {
  int count = 0;
  uint16_t subvec[kMaxPairs];
  uint8_t cell[kMaxPairs];
};

// Adds the num_lists nearest cells of kCount subvectors y, numbered from `first`, to `pairs`.
template <int kDim, int kCount>
static inline void nearest_cells(const FqCode& code, const float* y, int first, Pairs* pairs) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int num_cell_tiles = (code.num_cells + kTileRows - 1) / kTileRows;
  vf coords[kCount][kDim ? kDim : 64];
  const float* at[kCount];
  for (int s = 0; s < kCount; ++s) at[s] = y + s * dim;
  splat_coords<kDim, kCount>(at, dim, coords);
  alignas(64) float scores[kCount][kMaxCells];
  int32_t cell[kCount];
  float top[kCount];
  best_in_tiles<kDim, kCount>(code.cell_tiles, num_cell_tiles, dim, coords, cell, top,
                              code.num_lists > 1 ? scores[0] : nullptr);
  for (int s = 0; s < kCount; ++s) {
    for (int n = 0;;) {
      pairs->subvec[pairs->count] = (uint16_t)(first + s);
      pairs->cell[pairs->count++] = (uint8_t)cell[s];
      if (++n == code.num_lists) break;
      scores[s][cell[s]] = kMinusInf;
      cell[s] = best_of(scores[s], num_cell_tiles * kTileRows);
    }
  }
}

// Searches one list for kCount subvectors, keeping in score and row the best of all lists. A list's
// rows ascend, so the first of equals in it has the lowest index.
template <int kDim, int kCount>
static inline void search_list(const FqCode& code, int cell, const float* y, const uint16_t* subvec,
                               float* score, int32_t* row) {
  const int dim = kDim ? kDim : code.subvec_dim;
  const int64_t begin = code.list_begin[cell];
  vf coords[kCount][kDim ? kDim : 64];
  const float* from[kCount];
  for (int s = 0; s < kCount; ++s) from[s] = y + subvec[s] * dim;
  splat_coords<kDim, kCount>(from, dim, coords);
  int32_t at[kCount];
  float top[kCount];
  best_in_tiles<kDim, kCount>(code.list_tiles + begin * (dim + 1) * kTileRows,
                              code.list_begin[cell + 1] - (int)begin, dim, coords, at, top);
  for (int s = 0; s < kCount; ++s) {
    const int32_t found = code.list_index[begin * kTileRows + at[s]];
    const int i = subvec[s];
    if (top[s] > score[i] || (top[s] == score[i] && found < row[i])) {
      score[i] = top[s];
      row[i] = found;
    }
  }
}

// The nearest rows of `count` subvectors y among the lists of their code.num_lists nearest cells;
// count * num_lists is at most kMaxPairs. They are searched cell by cell: a list is read once for
// all subvectors that search it.
template <int kDim>
static void nearest_listed(const FqCode& code, int count, const float* y, uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  Pairs pairs;
  int s = 0;
  for (; s + 4 <= count; s += 4) nearest_cells<kDim, 4>(code, y + s * dim, s, &pairs);
  for (; s < count; ++s) nearest_cells<kDim, 1>(code, y + s * dim, s, &pairs);

  // Sorts by cell.
  int end[kMaxCells] = {};
  for (int i = 0; i < pairs.count; ++i) ++end[pairs.cell[i]];
  for (int c = 1; c < code.num_cells; ++c) end[c] += end[c - 1];
  uint16_t sorted[kMaxPairs];
  for (int i = pairs.count - 1; i >= 0; --i) sorted[--end[pairs.cell[i]]] = pairs.subvec[i];

  float score[kMaxPairs];
  int32_t row[kMaxPairs];
  for (int i = 0; i < count; ++i) {
    score[i] = kMinusInf;
    row[i] = INT32_MAX;
  }
  for (int c = 0; c < code.num_cells; ++c) {
    int i = end[c];  // by now where the cell's begin
    const int last = c + 1 < code.num_cells ? end[c + 1] : pairs.count;
    for (; i + 4 <= last; i += 4) search_list<kDim, 4>(code, c, y, sorted + i, score, row);
    for (; i + 2 <= last; i += 2) search_list<kDim, 2>(code, c, y, sorted + i, score, row);
    if (i < last) search_list<kDim, 1>(code, c, y, sorted + i, score, row);
  }
  for (int i = 0; i < count; ++i) index[i] = (uint32_t)row[i];
}

}  // namespace fq::FQ_ISA
