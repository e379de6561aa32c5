// SPDX-License-Identifier: Apache-2.0
// The nearest codeword among 256 with vectors of bytes; lanes are subvectors. Both searches find
// what `nearest` finds, to the bit:
//
//   squares  a pair lies in one of 64 x 64 squares, where at most four rows can be nearest. Their
//            coordinates are looked up in registers and compared in floats, as `nearest` does.
//   boxes    four coordinates lie in one of 8^4 boxes, where at most 16 rows can be nearest. Their
//            bytes are looked up in registers and compared in integers.
//   scan     eight coordinates are compared with all rows in integers of 16 bits.
//
// Where integers find a second best so near that rounding might have chosen, `nearest` decides, and
// so it does where a table does not reach (a square or a box of more rows, a coordinate too large).
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

// ---- boxes --------------------------------------------------------------------------------------

// Best and second best of what two have.
struct BestTwo {
  vi best, second;
};
static inline BestTwo best_two(BestTwo a, BestTwo b) {
  return {max_ints(a.best, b.best),
          max_ints(min_ints(a.best, b.best), max_ints(a.second, b.second))};
}

// The boxes of 16 subvectors y.
static inline vi find_boxes(const FqCode& code, const float* y) {
  vb bytes[4];
  for (int n = 0; n < 4; ++n) {
    const vf part = (load(y + 16 * n) - code.box_low) * code.box_fine;
    bytes[n] = (vb) __builtin_convertvector(part, vi);
  }
  vb low, all;  // the lowest bytes of 16 words and 16 others; 32 bytes and 32 others
  for (int i = 0; i < 64; ++i) low[i] = (uint8_t)(4 * (i % 32));
  for (int i = 0; i < 64; ++i) all[i] = (uint8_t)(i % 32 + 64 * (i / 32));
  const vb fine = permute(all, permute(low, bytes[0], bytes[1]), permute(low, bytes[2], bytes[3]));
  const vb side = permute(fine, load_bytes(code.box_sides), load_bytes(code.box_sides + 64));
  const vi weights = vi{} + 0x00400801;  // 1, 8 and 64
  return dot_bytes(vi{}, side, (vb)weights) + (((vi)side >> 24) << 9);
}

// Scores of 4 subvectors, times 256, with 255 less a row's number in the byte below: lane 4 n + i
// has of the n-th one the best two of rows i, i + 4, i + 8 and i + 12 of its box.
template <bool kFolded>
static inline BestTwo score_boxes(const FqCode& code, const Table* planes, const float* y,
                                  const int32_t* box) {
  const vi whole = to_ints(load(y) * code.box_scale - code.box_shift);
  const vi high_digit = (whole + 128) >> 8;
  vb spread;  // the lowest bytes of each part's words, in all of its words
  for (int i = 0; i < 64; ++i) spread[i] = (uint8_t)(i / 16 * 16 + 4 * (i % 4));
  const vb high = permute(spread, (vb)high_digit);
  const vb low = permute(spread, (vb)(whole - (high_digit << 8)));

  const uint8_t* at[4];
  for (int n = 0; n < 4; ++n) at[n] = code.boxes + 16 * (int64_t)box[n];
  const vb number = load_four(at, 16);
  const uint64_t upper = has_bits(number, 0x80);
  vb plane[4];
  for (int j = 0; j < 4; ++j) plane[j] = look_up(planes[j], number, upper);
  const vb sign = splat_byte(kFolded ? 0 : 0x80);
  // Bytes with a sign are multiplied as bytes + 128; what that adds is taken away, so that a score
  // fits.
  const vi added = dot_bytes(vi{}, sign, high);
  vi score[4];
  for (int q = 0; q < 4; ++q) {
    const vb c01 = zip_bytes(q / 2, plane[0], plane[1]), c23 = zip_bytes(q / 2, plane[2], plane[3]);
    const vb row = zip_words(q % 2, c01, c23);
    const vb size = kFolded ? row : absolute_bytes(row), unsigned_row = row ^ sign;
    vi sum = (dot_bytes(-added, unsigned_row, high) << 2) - dot_bytes(vi{}, size, size);
    sum = dot_bytes(sum << 6, unsigned_row, low);
    const vb last = zip_words(q % 2, zip_bytes(q / 2, ~number, vb{}), vb{});
    score[q] = (sum << 8) + (vi)last;
  }
  const BestTwo a = {max_ints(score[0], score[1]), min_ints(score[0], score[1])};
  const BestTwo b = {max_ints(score[2], score[3]), min_ints(score[2], score[3])};
  return best_two(a, b);
}

// Rows for 16 subvectors in these boxes. Returns which are still open.
template <bool kFolded>
static inline uint32_t search_boxes(const FqCode& code, const Table* planes, const float* y,
                                    const int32_t* box, vi* row) {
  vi best[4], second[4];
  vf largest = vf{};
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    largest = vmax(largest, vabs(load(y + 16 * n)));
    const BestTwo found = score_boxes<kFolded>(code, planes, y + 16 * n, box + 4 * n);
    best[n] = found.best;
    second[n] = found.second;
  }
  transpose_quads(best);
  transpose_quads(second);
  const BestTwo two = best_two(best_two({best[0], second[0]}, {best[1], second[1]}),
                               best_two({best[2], second[2]}, {best[3], second[3]}));
  const vi order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  *row = 255 - (__builtin_shuffle(two.best, order) & 255);
  const vi near = two.second >= two.best - (256 * code.box_margin + 255);
  uint32_t open = lane_bits(__builtin_shuffle(near, order));
  if (lane_bits(largest > code.box_reach)) {
    for (int i = 0; i < 64; ++i)
      open |= (uint32_t)(__builtin_fabsf(y[i]) > code.box_reach) << i / 4;
  }
  return open;
}

static void nearest_in_boxes(const FqCode& code, int num_subvecs, const float* y, uint32_t* index) {
  Table planes[4];
  for (int j = 0; j < 4; ++j) planes[j] = load_table(code.planes + 256 * j);
  constexpr int kGroups = 16;  // whose boxes are found before any is read: reads then do not wait
  alignas(64) int32_t box[16 * kGroups];
  alignas(64) float rest[64] = {};
  for (int s = 0; s < num_subvecs; s += 16 * kGroups) {
    const int count = num_subvecs - s < 16 * kGroups ? num_subvecs - s : 16 * kGroups;
    const auto from = [&](int i) -> const float* {  // 16 subvectors, the last ones of them 0
      if (count - i >= 16) return y + 4 * (s + i);
      return static_cast<float*>(memcpy(rest, y + 4 * (s + i), (size_t)(count - i) * 16));
    };
    for (int i = 0; i < count; i += 16) store_ints(box + i, find_boxes(code, from(i)));
    for (int i = 0; i < count; i += 16) {
      const int here = count - i < 16 ? count - i : 16;
      vi row;
      const auto search = code.folded ? search_boxes<true> : search_boxes<false>;
      const uint32_t open = search(code, planes, from(i), box + i, &row);
      memcpy(index + s + i, &row, (size_t)here * 4);
      if (open) settle<4>(code, open, here, y + 4 * (s + i), index + s + i);
    }
  }
}

// ---- scan ---------------------------------------------------------------------------------------

// 16 subvectors y as words: a lane of word[p] has coordinates 2 p and 2 p + 1 of one. Returns which
// have a coordinate that is too large.
static inline uint32_t quantise(const FqCode& code, const float* y, vi* word) {
  const vf scale = splat(code.scan_scale), most = splat((float)code.scan_most);
  vi packed[4];
  uint32_t large = 0;
  for (int p = 0; p < 4; ++p) {
    vi whole[2];
    for (int n = 0; n < 2; ++n) {
      const vf x = load(y + 32 * p + 16 * n) * scale;
      for (uint32_t bits = lane_bits(~(vabs(x) <= most)); bits; bits &= bits - 1) {
        large |= 1u << (32 * p + 16 * n + __builtin_ctz(bits)) / 8;
      }
      whole[n] = to_ints(x);
    }
    packed[p] = to_words(whole[0], whole[1]);
  }
  const vi even[2] = {even_lanes(packed[0], packed[1]), even_lanes(packed[2], packed[3])};
  const vi odd[2] = {odd_lanes(packed[0], packed[1]), odd_lanes(packed[2], packed[3])};
  word[0] = even_lanes(even[0], even[1]);
  word[1] = even_lanes(odd[0], odd[1]);
  word[2] = odd_lanes(even[0], even[1]);
  word[3] = odd_lanes(odd[0], odd[1]);
  return large;
}

// kGroups * 16 subvectors.
template <int kGroups>
static inline void scan(const FqCode& code, int count, const float* y, uint32_t* index) {
  constexpr int kDim = 8, kWords = 4;
  vi word[kGroups][kWords], best[kGroups], second[kGroups];
  uint32_t large[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    large[g] = quantise(code, y + 16 * g * kDim, word[g]);
    best[g] = second[g] = vi{} + INT32_MIN;
  }
  const int32_t* row = code.scan;
#pragma GCC unroll 4
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

static void nearest_scanned(const FqCode& code, int num_subvecs, const float* y, uint32_t* index) {
  constexpr int kDim = 8;
  int s = 0;
  for (; s + 32 <= num_subvecs; s += 32) scan<2>(code, 32, y + s * kDim, index + s);
  if (s == num_subvecs) return;
  alignas(64) float rest[32 * kDim];
  const int count = num_subvecs - s;
  memset(rest, 0, sizeof(rest));
  memcpy(rest, y + s * kDim, (size_t)count * kDim * 4);
  if (count > 16) return scan<2>(code, count, rest, index + s);
  scan<1>(code, count, rest, index + s);
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
