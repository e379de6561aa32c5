// SPDX-License-Identifier: Apache-2.0
// The nearest codeword among 256 with vectors of bytes; lanes are subvectors. Both searches find
// what `nearest` finds, to the bit:
//
//   squares  a pair lies in one of 64 x 64 squares, where at most four rows can be nearest. Their
//            coordinates are looked up in registers and compared in floats, as `nearest` does.
//   scan     four or eight coordinates are compared with all rows in integers of 16 bits. Where the
//            second best comes so near that rounding might have chosen, `nearest` decides.
//
// What a table does not cover (a square of more rows, a coordinate too large) goes to `nearest`.
#pragma once

#include "cpu/bytes.h"
#include "cpu/search.h"

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

// Those of 16 subvectors, or of the `count` that there are, whose bits are set in `open`.
template <int kDim>
static inline void settle(const FqCode& code, uint32_t open, int count, const float* y,
                          uint32_t* index) {
  open &= (1u << count) - 1;
  for (; open; open &= open - 1) {
    const int s = __builtin_ctz(open);
    nearest<kDim, 1>(code, y + s * kDim, index + s);
  }
}

// ---- squares ------------------------------------------------------------------------------------

constexpr int kSquares = 64;  // along an axis

static inline vi even_lanes(vi a, vi b) {
  const vi order = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, order);
}
static inline vi odd_lanes(vi a, vi b) {
  const vi order = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return __builtin_shuffle(a, b, order);
}

// Bytes a[0], b[0], a[1], b[1], .. of the first halves of a and b, or of their second.
static inline vb interleave(int half, vb a, vb b) {
  vb order;
  for (int i = 0; i < 64; ++i) order[i] = (uint8_t)(32 * half + i / 2 + 64 * (i % 2));
  return permute(order, a, b);
}
static inline vf interleave_words(int half, vb a, vb b) {
  typedef int16_t Words __attribute__((vector_size(64)));
  Words order;
  for (int i = 0; i < 32; ++i) order[i] = (int16_t)(16 * half + i / 2 + 32 * (i % 2));
  return (vf)__builtin_shuffle((Words)a, (Words)b, order);
}

// The 16 pairs whose first coordinates are x and second z. Returns which are still open.
static inline uint32_t search_squares(const FqCode& code, vf x, vf z, vi* row) {
  const vf column = (x - code.square_low) * code.square_scale;
  const vf line = (z - code.square_low) * code.square_scale;
  const vi inside =
      (column >= 0.0f) & (column < (float)kSquares) & (line >= 0.0f) & (line < (float)kSquares);
  const vi square =
      __builtin_convertvector(column, vi) + kSquares * __builtin_convertvector(line, vi);
  const vi rows = load_quads(code.squares, square & inside);
  const uint32_t open = lane_bits(~inside | (rows == -1));

  vb by_candidate;  // part n has candidate n of every pair
  for (int i = 0; i < 64; ++i) by_candidate[i] = (uint8_t)(i % 16 * 4 + i / 16);
  const vb number = permute(by_candidate, (vb)rows);
  const uint64_t high = has_bits(number, 0x80);
  vb plane[8];
  for (int i = 0; i < 8; ++i) {
    plane[i] = look_up(load_table(code.square_planes + 256 * i), number, high);
  }
  vf best = vf{};
  vi slot = vi{};
  for (int half = 0; half < 2; ++half) {
    const vb c0 = interleave(half, plane[0], plane[1]), c1 = interleave(half, plane[2], plane[3]);
    const vb low = interleave(half, plane[4], plane[5]), top = interleave(half, plane[6], plane[7]);
    for (int n = 0; n < 2; ++n) {
      vf score = interleave_words(n, low, top);
      score = madd(halves_to_floats(c0, n), x, score);
      score = madd(halves_to_floats(c1, n), z, score);
      if (half == 0 && n == 0) {
        best = score;
        continue;
      }
      const vi better = score > best;  // rows ascend: the first of equals stays
      best = vmax(score, best);
      slot = better ? vi{} + 8 * (2 * half + n) : slot;
    }
  }
  *row = rows >> slot & 0xFF;
  return open;
}

static void nearest_in_squares(const FqCode& code, int num_pairs, const float* y, uint32_t* index) {
  for (int s = 0; s < num_pairs; s += 16) {
    const int count = num_pairs - s < 16 ? num_pairs - s : 16;
    alignas(64) float rest[32] = {};
    const float* pairs = y + 2 * s;
    if (count < 16) pairs = static_cast<float*>(memcpy(rest, pairs, (size_t)count * 8));
    const vi a = (vi)load(pairs), b = (vi)load(pairs + 16);
    vi row;
    const uint32_t open = search_squares(code, (vf)even_lanes(a, b), (vf)odd_lanes(a, b), &row);
    memcpy(index + s, &row, (size_t)count * 4);
    if (open) settle<2>(code, open, count, pairs, index + s);
  }
}

// ---- scan ---------------------------------------------------------------------------------------

// 16 subvectors y as words: a lane of word[p] has coordinates 2 p and 2 p + 1 of one. Returns which
// have a coordinate that is too large.
template <int kDim>
static inline uint32_t quantise(const FqCode& code, const float* y, vi* word) {
  const vf scale = splat(code.scan_scale), most = splat((float)code.scan_most);
  vi packed[kDim / 2];
  uint32_t large = 0;
  for (int p = 0; p < kDim / 2; ++p) {
    vi whole[2];
    for (int n = 0; n < 2; ++n) {
      const vf x = load(y + 32 * p + 16 * n) * scale;
      for (uint32_t bits = lane_bits(~(vabs(x) <= most)); bits; bits &= bits - 1) {
        large |= 1u << (32 * p + 16 * n + __builtin_ctz(bits)) / kDim;
      }
      whole[n] = to_ints(x);
    }
    packed[p] = to_words(whole[0], whole[1]);
  }
  if constexpr (kDim == 4) {
    word[0] = even_lanes(packed[0], packed[1]);
    word[1] = odd_lanes(packed[0], packed[1]);
  } else {
    static_assert(kDim == 8);
    const vi even[2] = {even_lanes(packed[0], packed[1]), even_lanes(packed[2], packed[3])};
    const vi odd[2] = {odd_lanes(packed[0], packed[1]), odd_lanes(packed[2], packed[3])};
    word[0] = even_lanes(even[0], even[1]);
    word[1] = even_lanes(odd[0], odd[1]);
    word[2] = odd_lanes(even[0], even[1]);
    word[3] = odd_lanes(odd[0], odd[1]);
  }
  return large;
}

// kGroups * 16 subvectors.
template <int kDim, int kGroups>
static inline void scan(const FqCode& code, int count, const float* y, uint32_t* index) {
  constexpr int kWords = kDim / 2;
  vi word[kGroups][kWords], best[kGroups], second[kGroups];
  uint32_t large[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    large[g] = quantise<kDim>(code, y + 16 * g * kDim, word[g]);
    best[g] = second[g] = vi{} + INT32_MIN;
  }
  const int32_t* row = code.scan;
  for (int n = 0; n < 256; ++n, row += 1 + kWords) {
    vi c[kWords];
    for (int p = 0; p < kWords; ++p) c[p] = vi{} + row[1 + p];
    for (int g = 0; g < kGroups; ++g) {
      vi score = vi{} + row[0];
      for (int p = 0; p < kWords; ++p) score = dot_words(score, word[g][p], c[p]);
      second[g] = max_ints(second[g], min_ints(best[g], score));
      best[g] = max_ints(best[g], score);
    }
  }
  for (int g = 0; g < kGroups; ++g, y += 16 * kDim, index += 16, count -= 16) {
    const vi found = 255 - (best[g] & 255);
    const uint32_t open = large[g] | lane_bits(second[g] >= best[g] - code.scan_margin);
    const int here = count < 16 ? count : 16;
    memcpy(index, &found, (size_t)here * 4);
    if (open) settle<kDim>(code, open, here, y, index);
  }
}

template <int kDim>
static void nearest_scanned(const FqCode& code, int num_subvecs, const float* y, uint32_t* index) {
  int s = 0;
  for (; s + 32 <= num_subvecs; s += 32) scan<kDim, 2>(code, 32, y + s * kDim, index + s);
  if (s == num_subvecs) return;
  alignas(64) float rest[32 * kDim];
  const int count = num_subvecs - s;
  memset(rest, 0, sizeof(rest));
  memcpy(rest, y + s * kDim, (size_t)count * kDim * 4);
  if (count > 16) return scan<kDim, 2>(code, count, rest, index + s);
  scan<kDim, 1>(code, count, rest, index + s);
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
