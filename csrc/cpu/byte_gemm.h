// SPDX-License-Identifier: Apache-2.0
// Products of digits and tiles of bytes: rows' queries with keys, rows' weights with values.
#pragma once

#include "cpu/byte_job.h"

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

// Scores, but for the tokens' factors, of rows from `row` on and kGroups groups of keys.
template <int kRows, int kGroups>
static inline void dot_groups(const ByteKeys& keys, const uint8_t* tile, int64_t group_bytes,
                              const ByteScratch& s, int row, float* scores) {
  vi high[kRows][kGroups], low[kRows][kGroups];
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) {
      high[r][g] = vi{} + s.digit_start[2 * (row + r)];
      low[r][g] = vi{} + s.digit_start[2 * (row + r) + 1];
    }
  }
  const uint8_t* digits = s.digits + (int64_t)row * kDigitStride;
  for (int v = 0; v < keys.num_high; ++v) {
    vb x[kGroups];
    for (int g = 0; g < kGroups; ++g) x[g] = load_bytes(tile + g * group_bytes + v * 64);
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = digits + r * kDigitStride + v * 4;
      const vb a = (vb)splat_quad(p), b = (vb)splat_quad(p + kDigitStride / 2);
      for (int g = 0; g < kGroups; ++g) {
        high[r][g] = dot_bytes(high[r][g], x[g], a);
        low[r][g] = dot_bytes(low[r][g], x[g], b);
      }
    }
  }
  tile += keys.num_high * 64;
  for (int v = 0; v < keys.num_low; ++v) {
    vb x[kGroups];
    for (int g = 0; g < kGroups; ++g) x[g] = load_bytes(tile + g * group_bytes + v * 64);
    for (int r = 0; r < kRows; ++r) {
      const vb a = (vb)splat_quad(digits + r * kDigitStride + v * 4);
      for (int g = 0; g < kGroups; ++g) low[r][g] = dot_bytes(low[r][g], x[g], a);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const vf scale = splat(s.digit_scale[row + r]), half = splat(s.digit_half[row + r]);
    for (int g = 0; g < kGroups; ++g) {
      const vf x = madd(to_floats(high[r][g]), splat(256.0f), to_floats(low[r][g])) + half;
      store(scores + r * kSplit + g * kGroup, x * scale);
    }
  }
}

template <int kRows, int kGroups>
static inline void dot_rows(const ByteKeys& keys, int num_groups, int64_t group_bytes,
                            const ByteScratch& s, int row, int token) {
  float* scores = s.scores + (int64_t)row * kSplit + token;
  int g = 0;
  for (; g + kGroups <= num_groups; g += kGroups) {
    dot_groups<kRows, kGroups>(keys, s.tile + g * group_bytes, group_bytes, s, row,
                               scores + g * kGroup);
  }
  for (; g < num_groups; ++g) {
    dot_groups<kRows, 1>(keys, s.tile + g * group_bytes, group_bytes, s, row, scores + g * kGroup);
  }
}

// Scores of all rows and of the chunk of keys in s.tile, which begins at token `token` of the
// split.
static void dot_chunk(const ByteKeys& keys, int rows, int num_groups, int64_t group_bytes,
                      const ByteScratch& s, int token) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4, 2>(keys, num_groups, group_bytes, s, r, token);
  if (rows - r == 3) dot_rows<3, 4>(keys, num_groups, group_bytes, s, r, token);
  if (rows - r == 2) dot_rows<2, 4>(keys, num_groups, group_bytes, s, r, token);
  if (rows - r == 1) dot_rows<1, 4>(keys, num_groups, group_bytes, s, r, token);
}

// Adds to the sums of rows from `row` on the columns [first, first + kColumns) of num_quads times
// four tokens, from token `token` of the split on.
template <int kRows, int kColumns, bool kTwoBytes>
static inline void add_columns(int columns, int first, int num_quads, const ByteScratch& s, int row,
                               int token) {
  constexpr int kKinds = num_sums(kTwoBytes);
  vi sum[kRows][kColumns][kKinds];
  int32_t* sums = s.sums + ((int64_t)row * kKinds * columns + first) * 16;
  const int row_ints = kKinds * columns * 16;
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      for (int k = 0; k < kKinds; ++k) {
        sum[r][c][k] = load_ints(sums + r * row_ints + (k * columns + c) * 16);
      }
    }
  }
  const uint8_t* weights = s.weights + (int64_t)row * 2 * kSplit + token;
  const uint8_t* tile = s.tile + first * 64;
  for (int quad = 0; quad < num_quads; ++quad, tile += columns * (kTwoBytes ? 128 : 64)) {
    vb x[kColumns], y[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      x[c] = load_bytes(tile + c * 64);
      if constexpr (kTwoBytes) y[c] = load_bytes(tile + (columns + c) * 64);
    }
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = weights + r * 2 * kSplit + quad * 4;
      const vb a = (vb)splat_quad(p), b = (vb)splat_quad(p + kSplit);
      for (int c = 0; c < kColumns; ++c) {
        vi* to = sum[r][c];
        to[0] = dot_bytes(to[0], a, x[c]);
        to[1] = dot_bytes(to[1], b, x[c]);
        if constexpr (kTwoBytes) {
          to[1] = dot_bytes(to[1], a, y[c]);
          to[2] = dot_bytes(to[2], b, y[c]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      for (int k = 0; k < kKinds; ++k) {
        store_ints(sums + r * row_ints + (k * columns + c) * 16, sum[r][c][k]);
      }
    }
  }
}

template <int kRows, int kColumns, bool kTwoBytes>
static inline void add_rows(int columns, int num_quads, const ByteScratch& s, int row, int token) {
  int c = 0;
  for (; c + kColumns <= columns; c += kColumns) {
    add_columns<kRows, kColumns, kTwoBytes>(columns, c, num_quads, s, row, token);
  }
  for (; c < columns; c += 2) {
    add_columns<kRows, 2, kTwoBytes>(columns, c, num_quads, s, row, token);
  }
}

template <bool kTwoBytes>
static void add_chunk(int columns, int rows, int num_groups, const ByteScratch& s, int token) {
  const int quads = num_groups * kGroup / 4;
  int r = 0;
  for (; r + 4 <= rows; r += 4) add_rows<4, 2, kTwoBytes>(columns, quads, s, r, token);
  if (rows - r == 3) add_rows<3, kTwoBytes ? 2 : 4, kTwoBytes>(columns, quads, s, r, token);
  if (rows - r == 2) add_rows<2, 4, kTwoBytes>(columns, quads, s, r, token);
  if (rows - r == 1) add_rows<1, kTwoBytes ? 4 : 8, kTwoBytes>(columns, quads, s, r, token);
}

// Adds the chunk of values in s.tile to the sums of all rows.
static void add_chunk(bool has_two_bytes, int columns, int rows, int num_groups,
                      const ByteScratch& s, int token) {
  if (has_two_bytes) return add_chunk<true>(columns, rows, num_groups, s, token);
  add_chunk<false>(columns, rows, num_groups, s, token);
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
