// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows over one tile of tokens whose keys or values are floats in cache.
//
// Bit-equality: what a row gets depends only on its own query and on the tokens it may see, never
// on which rows share its call. Every sum below has one order, whatever the register blocking;
// tokens a row may not see add exact zeros; and tile bounds are multiples of tile_tokens().
#pragma once

#include "cpu/codec.h"

namespace fq::FQ_ISA {

constexpr float kEmptyMax = -1e30f;  // running maximum of no tokens; finite, so no inf - inf
constexpr int kMaxTile = 32;
constexpr int kSplit = 512;  // tokens of a split

// Tokens per tile; a tile of keys stays within half the L1 cache.
static inline int tile_tokens(int head_dim) { return head_dim <= 128 ? 32 : 16; }

// A mergeable attention state of `rows` rows. No tokens: m = kEmptyMax, l = 0, o = 0.
struct State {
  float* m;  // [rows] running maximum of the scores
  float* l;  // [rows] sum of exp(score - m)
  float* o;  // [rows, head_dim] sum of exp(score - m) * value
};

static inline int64_t state_floats(int rows, int head_dim) {
  return (int64_t)rows * (head_dim + 2);
}

static inline State state_at(float* base, int rows, int head_dim) {
  return {base + (int64_t)rows * head_dim, base + (int64_t)rows * (head_dim + 1), base};
}

static inline void clear(const State& s, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    s.m[r] = kEmptyMax;
    s.l[r] = 0.0f;
  }
  memset(s.o, 0, (size_t)rows * head_dim * 4);
}

// into = into + from, rows of both relative to the larger maximum.
static inline void merge(const State& into, const State& from, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    const float m = fmax2(into.m[r], from.m[r]);
    const float keep = exp1(into.m[r] - m), add = exp1(from.m[r] - m);
    into.m[r] = m;
    into.l[r] = into.l[r] * keep + from.l[r] * add;
    float* o = into.o + (int64_t)r * head_dim;
    const float* p = from.o + (int64_t)r * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) {
      store(o + i, madd(load(p + i), splat(add), load(o + i) * splat(keep)));
    }
  }
}

// A tile of keys or values as floats, [tokens, head_dim].
struct DenseTile {
  static constexpr bool kSpills = false;
  static constexpr int kNumParts = 1;
  const float* base;
  int head_dim;
  const float* word(int t, size_t i) const { return base + (int64_t)t * head_dim + i; }
  vf at(const float* word, int c) const { return load(word + c * kLanes); }
};

// A tile of keys or values as codes: fields[t] are the packed indices of token t.
template <class C>
struct CodeTile {
  static constexpr bool kSpills = C::kSpills;
  static constexpr int kNumParts = 1;
  C codes;
  const uint8_t* const* fields;
  typename C::Word word(int t, size_t i) const { return codes.word(fields[t], i); }
  vf at(const typename C::Word& word, int c) const { return codes.at(word, c); }
};

// A part of a tile of codes, which begins at byte `offset` of every token's indices.
template <class C>
struct PartTile {
  C codes;
  const uint8_t* const* fields;
  size_t offset;
  typename C::Word word(int t, size_t i) const { return codes.word(fields[t] + offset, i); }
  vf at(const typename C::Word& word, int c) const { return codes.at(word, c); }
};

// A tile of transformed keys (FqKeyMap) whose runs are whole units: subvectors of 2 coordinates up
// to coordinate end2, of 4 up to end4, then of 8. kUnits2, kUnits4 and kUnits8 fix the runs' units,
// so that short loops unroll; all 0 where they are not known.
template <int kUnits2, int kUnits4, int kUnits8>
struct MappedTile {
  static constexpr bool kSpills = false;
  static constexpr int kNumParts = 3;
  static constexpr int kUnits[3] = {kUnits2, kUnits4, kUnits8};
  PartTile<Codes<2, false>> part2;
  PartTile<Codes<4, false>> part4;
  PartTile<Codes<8, false>> part8;
  int end2, end4;
};

// acc[r][j] += <q[r], k[t + j]>, lane by lane, over the unit of coordinates from i on; rows have
// stride head_dim.
template <int kRows, int kTokens, class Tile>
[[gnu::always_inline]] static inline void dot_unit(const float* q, const Tile& k, int head_dim,
                                                   size_t i, int t, vf (&acc)[kRows][kTokens]) {
  decltype(k.word(0, 0)) words[kTokens];
  for (int j = 0; j < kTokens; ++j) words[j] = k.word(t + j, i);
  for (int c = 0; c < kPerUnit; ++c) {
    vf qv[kRows];
    for (int r = 0; r < kRows; ++r) qv[r] = load(q + r * head_dim + i + c * kLanes);
    for (int j = 0; j < kTokens; ++j) {
      const vf kv = k.at(words[j], c);
      for (int r = 0; r < kRows; ++r) acc[r][j] = madd(qv[r], kv, acc[r][j]);
    }
  }
}

// The same over `count` coordinates, or over kUnits units if that is not 0.
template <int kRows, int kTokens, int kUnits = 0, class Tile>
[[gnu::always_inline]] static inline void dot_add(const float* q, const Tile& k, int head_dim,
                                                  int count, int t, vf (&acc)[kRows][kTokens]) {
  if constexpr (kUnits > 0) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) dot_unit(q, k, head_dim, (size_t)(u * kUnit), t, acc);
  } else {
    for (size_t i = 0; i < (size_t)count; i += kUnit) dot_unit(q, k, head_dim, i, t, acc);
  }
}

// scores[r][t] = <q[r], k[t]> for kRows rows of stride head_dim and t in steps of kTokens.
template <int kRows, int kTokens, class Tile>
static inline void dot_block(const float* q, const Tile& k, int head_dim, int num_tokens,
                             float* scores) {
  for (int t = 0; t < num_tokens; t += kTokens) {
    vf acc[kRows][kTokens] = {};
    if constexpr (Tile::kNumParts == 3) {
      constexpr int kUnits2 = Tile::kUnits[0], kUnits4 = Tile::kUnits[1], kUnits8 = Tile::kUnits[2];
      constexpr int kEnd2 = kUnits2 * kUnit, kEnd4 = kEnd2 + kUnits4 * kUnit;
      const int end2 = kEnd4 ? kEnd2 : k.end2, end4 = kEnd4 ? kEnd4 : k.end4;
      const int dim = kEnd4 ? kEnd4 + kUnits8 * kUnit : head_dim;
      dot_add<kRows, kTokens, kUnits2>(q, k.part2, dim, end2, t, acc);
      dot_add<kRows, kTokens, kUnits4>(q + end2, k.part4, dim, end4 - end2, t, acc);
      dot_add<kRows, kTokens, kUnits8>(q + end4, k.part8, dim, dim - end4, t, acc);
    } else {
      dot_add<kRows, kTokens>(q, k, head_dim, head_dim, t, acc);
    }
    if constexpr (kTokens == 2) {
      for (int r = 0; r < kRows; r += 2) {
        const int next = r + 1 < kRows ? r + 1 : r;
        const v4 s = sum4(acc[r][0], acc[r][1], acc[next][0], acc[next][1]);
        memcpy(scores + r * kMaxTile + t, &s, 8);
        memcpy(scores + next * kMaxTile + t, reinterpret_cast<const char*>(&s) + 8, 8);
      }
    } else {
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < kTokens; j += 4) {
          *reinterpret_cast<v4_any*>(scores + r * kMaxTile + t + j) =
              sum4(acc[r][j], acc[r][j + 1], acc[r][j + 2], acc[r][j + 3]);
        }
      }
    }
  }
}

// o[r] = o[r] * alpha[r] + sum over t of p[r][t] * v[t], for kUnits units of columns from `first`.
template <int kRows, int kUnits, class Tile>
static inline void axpy_block(const float* p, const float* alpha, const Tile& v, int head_dim,
                              int num_tokens, size_t first, float* o) {
  constexpr int kColumns = kUnits * kPerUnit;
  vf acc[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      acc[r][c] = load(o + r * head_dim + first + c * kLanes) * splat(alpha[r]);
    }
  }
  for (int t = 0; t < num_tokens; ++t) {
    vf weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = splat(p[r * kMaxTile + t]);
    for (int u = 0; u < kUnits; ++u) {
      const auto word = v.word(t, first + u * kUnit);
      for (int c = 0; c < kPerUnit; ++c) {
        const vf vv = v.at(word, c);
        for (int r = 0; r < kRows; ++r) {
          vf& sum = acc[r][u * kPerUnit + c];
          sum = madd(weight[r], vv, sum);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store(o + r * head_dim + first + c * kLanes, acc[r][c]);
  }
}

template <int kRows, int kUnits, class Tile>
static inline void axpy(const float* p, const float* alpha, const Tile& v, int head_dim,
                        int num_tokens, float* o) {
  const size_t columns = (size_t)head_dim;
  size_t i = 0;
  for (; i + kUnits * kUnit <= columns; i += kUnits * kUnit) {
    axpy_block<kRows, kUnits>(p, alpha, v, head_dim, num_tokens, i, o);
  }
  // One unit alone would wait for its own sums.
  constexpr int kHalf = kUnits > 1 ? kUnits / 2 : 1;
  for (; i + kHalf * kUnit <= columns; i += kHalf * kUnit) {
    axpy_block<kRows, kHalf>(p, alpha, v, head_dim, num_tokens, i, o);
  }
  for (; i < columns; i += kUnit) axpy_block<kRows, 1>(p, alpha, v, head_dim, num_tokens, i, o);
}

// Register blocking: kRows * kTokens (dot) and kRows * kUnits * kPerUnit (axpy) accumulators within
// 16 (AVX2) or 32 (AVX-512) vector registers.
constexpr int kScale = kLanes == 16 ? 2 : 1;
constexpr int units(int vectors) { return vectors > kPerUnit ? vectors / kPerUnit : 1; }

// Scores of all rows; num_tokens is a multiple of 8.
template <class Tile>
static void dot_tile(const float* q, int rows, const Tile& k, int head_dim, int num_tokens,
                     float* scores) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    dot_block<4, 2 * kScale>(q + r * head_dim, k, head_dim, num_tokens, scores + r * kMaxTile);
  }
  q += r * head_dim;
  scores += r * kMaxTile;
  if (rows - r == 3) dot_block<3, Tile::kSpills ? 2 : 4>(q, k, head_dim, num_tokens, scores);
  if (rows - r == 2) dot_block<2, 4>(q, k, head_dim, num_tokens, scores);
  if (rows - r == 1) dot_block<1, 4>(q, k, head_dim, num_tokens, scores);
}

template <class Tile>
static void axpy_tile(const float* p, const float* alpha, int rows, const Tile& v, int head_dim,
                      int num_tokens, float* o) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    axpy<4, units(2 * kScale)>(p + r * kMaxTile, alpha + r, v, head_dim, num_tokens,
                               o + r * head_dim);
  }
  p += r * kMaxTile;
  alpha += r;
  o += r * head_dim;
  if (rows - r == 3) axpy<3, units(4 * kScale)>(p, alpha, v, head_dim, num_tokens, o);
  if (rows - r == 2) axpy<2, units(4 * kScale)>(p, alpha, v, head_dim, num_tokens, o);
  if (rows - r == 1) axpy<1, units(8 * kScale)>(p, alpha, v, head_dim, num_tokens, o);
}

// Rows up to which decoding codes once more per pass is cheaper than a pass through scratch.
constexpr int kMaxFusedRows = 4;

// Scores of a tile of codes, and the weighted sum of one; `scratch` holds [kMaxTile, head_dim].
template <class C>
static void dot_codes(const FqCode& code, const uint8_t* const* fields, const float* q, int rows,
                      int head_dim, int num_tokens, float* scratch, float* scores) {
  if (rows <= kMaxFusedRows) {
    dot_tile(q, rows, CodeTile<C>{{code.rows}, fields}, head_dim, num_tokens, scores);
  } else {
    decode_records<C>(code, head_dim, fields, num_tokens, scratch);
    dot_tile(q, rows, DenseTile{scratch, head_dim}, head_dim, num_tokens, scores);
  }
}

template <class C>
static void axpy_codes(const FqCode& code, const uint8_t* const* fields, const float* p,
                       const float* alpha, int rows, int head_dim, int num_tokens, float* scratch,
                       float* o) {
  if (rows <= kMaxFusedRows) {
    axpy_tile(p, alpha, rows, CodeTile<C>{{code.rows}, fields}, head_dim, num_tokens, o);
  } else {
    decode_records<C>(code, head_dim, fields, num_tokens, scratch);
    axpy_tile(p, alpha, rows, DenseTile{scratch, head_dim}, head_dim, num_tokens, o);
  }
}

// The same for codes without a fast path.
static void dot_any(const FqCode& code, const uint8_t* const* fields, const float* q, int rows,
                    int head_dim, int num_tokens, float* scratch, float* scores) {
  decode_records_any(code, head_dim, fields, num_tokens, scratch);
  dot_tile(q, rows, DenseTile{scratch, head_dim}, head_dim, num_tokens, scores);
}

static void axpy_any(const FqCode& code, const uint8_t* const* fields, const float* p,
                     const float* alpha, int rows, int head_dim, int num_tokens, float* scratch,
                     float* o) {
  decode_records_any(code, head_dim, fields, num_tokens, scratch);
  axpy_tile(p, alpha, rows, DenseTile{scratch, head_dim}, head_dim, num_tokens, o);
}

struct CodeKernels {
  decltype(&dot_any) dot;
  decltype(&axpy_any) axpy;
  decltype(&decode_records_any) decode;
};

template <class C>
constexpr CodeKernels kFast = {dot_codes<C>, axpy_codes<C>, decode_records<C>};

static CodeKernels code_kernels(const FqCode& code) {
  if (code.num_rows == 256) {
    if (code.subvec_dim == 2) return code.folded ? kFast<Codes<2, true>> : kFast<Codes<2, false>>;
    if (code.subvec_dim == 4) return code.folded ? kFast<Codes<4, true>> : kFast<Codes<4, false>>;
    if (code.subvec_dim == 8 && !code.folded) return kFast<Codes<8, false>>;
  }
  return {dot_any, axpy_any, decode_records_any};
}

// The oldest position that a query at `position` sees; `reach` as in FqAttend.
static inline int first_seen(int reach, int position) {
  if (reach < 0) return position - position % -reach;
  return reach > 0 && position >= reach ? position - reach + 1 : 0;
}

// Which tokens of the tile [begin, begin + count) each row may see.
struct Mask {
  int begin;
  int count;
  int first_position;   // position of row 0
  int rows_per_token;   // rows r and r + 1 share a position unless r + 1 is a multiple of this
  int reach;            // as in FqAttend
  int oldest;           // positions below this are nobody's
  const float* hidden;  // [tile] of 0 or -inf, added to every row's scores; null = all 0
  const float* bias;    // [rows], added to every score of a row; null = all 0
  const float* biases;  // [rows, kMaxTile], added to every score; null = all 0
};

// Turns scores [rows, mask.count] into weights exp(score - m) * value_factor and updates m and l.
// alpha[r] is what the row's old o must be multiplied by.
static inline void softmax_tile(float* scores, int rows, const float* key_factor,
                                const float* value_factor, const Mask& mask, float soft_cap,
                                const State& state, float* alpha) {
  const int last = mask.begin + mask.count - 1;
  const int end = (mask.count + kLanes - 1) / kLanes * kLanes;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * kMaxTile;
    const int position = mask.first_position + r / mask.rows_per_token;
    const int start = first_seen(mask.reach, position);
    const int oldest = start > mask.oldest ? start : mask.oldest;
    const int newest = position < last ? position : last;
    const bool whole = newest - mask.begin == end - 1 && oldest <= mask.begin && !mask.hidden;
    vf largest = splat(kMinusInf);
    for (int i = 0; i < end; i += kLanes) {
      vf x = load(s + i) * load(key_factor + i);
      if (mask.bias) x = x + splat(mask.bias[r]);
      if (mask.biases) x = x + load(mask.biases + r * kMaxTile + i);
      if (soft_cap > 0.0f) x = splat(soft_cap) * vtanh(x * splat(1.0f / soft_cap));
      if (!whole) {
        const vi token = lane + (mask.begin + i);
        if (mask.hidden) x = x + load(mask.hidden + i);
        x = select((token <= newest) & (token >= oldest), x, splat(kMinusInf));
      }
      store(s + i, x);
      largest = vmax(largest, x);
    }
    const float m = fmax2(state.m[r], max_lane(largest));
    alpha[r] = m == state.m[r] ? 1.0f : exp1(state.m[r] - m);
    vf total = vf{};
    for (int i = 0; i < end; i += kLanes) {
      const vf weight = vexp(load(s + i) - splat(m));
      total = total + weight;
      store(s + i, weight * load(value_factor + i));
    }
    state.m[r] = m;
    state.l[r] = state.l[r] * alpha[r] + sum(total);
  }
}

}  // namespace fq::FQ_ISA
