// SPDX-License-Identifier: Apache-2.0
// Codes to tiles of bytes, as dot products of bytes want them.
//
// A codeword's coordinates are bytes of planes (FqCode::planes): one table of 256 bytes for each
// coordinate, or two, high and low bytes. What is looked up with 64 indices is a vector.
//
//   keys     16 tokens, one per 32-bit lane, whose four bytes are a coordinate of four neighbouring
//            subvectors, a unit: the products of a lane are one token's. Offset by 128, unsigned.
//   values   16 subvectors, one per lane, whose four bytes are a coordinate of four tokens.
//
// Vectors of high planes come first, in order of subvectors and then of coordinates; those of low
// planes follow. Behind the last subvector there may be some that nobody asks for.
#pragma once

#include "cpu/bytes.h"
#include "cpu/params.h"

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

constexpr int kGroup = 16;  // tokens of a vector of keys

static inline int round_up(int x, int step) { return (x + step - 1) / step * step; }

// Records `stride` bytes apart; `at` is the first one's first byte of interest.
struct Records {
  const uint8_t* at;
  int64_t stride;
};

struct alignas(64) Order {
  uint8_t at[64];
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int unit_bytes(int dim, bool folded) { return folded ? (8 + dim) / 2 : 4; }

// Folded indices of four neighbours, 5 or 6 bytes, are moved to the beginning of 8.
constexpr Order make_spread(int unit_bytes) {
  Order o = {};
  for (int i = 0; i < 64; ++i) {
    const int byte = i % 8 < unit_bytes ? i % 8 : unit_bytes - 1;
    o.at[i] = (uint8_t)(i / 32 * 32 + i % 32 / 8 * unit_bytes + byte);
  }
  return o;
}

// Then magnitudes fill the first four of these bytes, and signs, their lowest bits, the others.
constexpr Order make_shifts(int bits) {
  Order o = {};
  for (int i = 0; i < 64; ++i) o.at[i] = (uint8_t)(i % 4 * bits + (i & 4 ? 8 : 0));
  return o;
}

// Which subvector of 16 lane `lane` holds: such that sums are in order after one transposition.
constexpr int subvec_of(int lane, int dim) {
  const int part = lane / 4, i = lane % 4;
  if (dim == 2) return i / 2 * 8 + 2 * part + i % 2;
  return dim == 4 ? 4 * i + part : lane;
}

// Bytes of 16 subvectors of four tokens, from four parts or from two vectors of spread ones.
constexpr Order make_quads(int dim, bool folded, int sign) {
  Order o = {};
  for (int i = 0; i < 64; ++i) {
    const int s = subvec_of(i / 4, dim), t = i % 4;
    o.at[i] = (uint8_t)(folded ? t * 32 + s / 4 * 8 + s % 4 + sign : t * 16 + s);
  }
  return o;
}

// Vectors of one kind of plane of the values of four tokens.
static inline int num_columns(const FqCode& code, int num_subvecs) {
  return ceil_div(num_subvecs, 16) * code.subvec_dim;
}

template <int kDim, bool kFolded>
struct ByteCode {
  static_assert(kDim == 2 || kDim == 4 || (kDim == 8 && !kFolded));
  static constexpr int kPlaneBytes = kDim == 2 ? 2 : 1;
  static constexpr int kRounds = kDim == 8 ? 2 : 1;  // of four planes each
  static constexpr int kBits = kFolded ? 8 + kDim : 8;
  static constexpr int kUnitBytes = unit_bytes(kDim, kFolded);  // of four indices
  static constexpr int kChunkBytes = 4 * kUnitBytes;            // of 16
  static constexpr Order kSpread = make_spread(kUnitBytes), kShifts = make_shifts(kBits);
  static constexpr Order kQuads = make_quads(kDim, kFolded, 0);
  static constexpr Order kQuadSigns = make_quads(kDim, kFolded, 4);

  // Indices, and signs, of up to 16 subvectors of two tokens; `count` is the bytes they have.
  static vb expand(const uint8_t* p0, const uint8_t* p1, int count) {
    const vb x = permute(load_bytes(kSpread.at), load_two(p0, p1, count));
    return fields_at(load_bytes(kShifts.at), x);
  }

  // The plane of table p of a round, and whether it is a low one.
  static constexpr bool is_low(int p) { return kPlaneBytes == 2 && p >= 2; }
  static constexpr int coordinate(int round, int p) { return is_low(p) ? p - 2 : 4 * round + p; }

  static void load_tables(const FqCode& code, int round, vb offset, Table* table) {
    for (int p = 0; p < 4; ++p) {
      table[p] = load_table(code.planes + (4 * round + p) * 256);
      for (vb& part : table[p].part) part ^= offset;
    }
  }

  // Looks up 64 indices in the tables of a round. out[p] gets plane p.
  [[gnu::always_inline]] static inline void look_up_all(const Table* table, vb index, vb signs,
                                                        uint8_t* const* out) {
    const uint64_t high = has_bits(index, 0x80);
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      vb x = look_up(table[p], index, high);
      if constexpr (kFolded) x = complement(has_bits(signs, (uint8_t)(1 << p % kDim)), x);
      store_bytes(out[p], x);
    }
  }

  // 16 tokens' indices, and signs, of the units of one chunk.
  [[gnu::always_inline]] static inline void load_units(const Records& r, int count, vb* index,
                                                       vb* signs) {
    if constexpr (kFolded) {
      vi first[4], second[4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* p = r.at + i * r.stride;
        first[i] = (vi)expand(p, p + 4 * r.stride, count);
        second[i] = (vi)expand(p + 8 * r.stride, p + 12 * r.stride, count);
      }
      transpose_quads(first);
      transpose_quads(second);
      for (int i = 0; i < 2; ++i) {
        index[i] = (vb)even_parts(first[2 * i], second[2 * i]);
        index[2 + i] = (vb)odd_parts(first[2 * i], second[2 * i]);
        signs[i] = (vb)even_parts(first[2 * i + 1], second[2 * i + 1]);
        signs[2 + i] = (vb)odd_parts(first[2 * i + 1], second[2 * i + 1]);
      }
    } else {
      vi x[4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* p = r.at + i * r.stride;
        const uint8_t* const four[4] = {p, p + 4 * r.stride, p + 8 * r.stride, p + 12 * r.stride};
        x[i] = (vi)load_four(four, count);
      }
      transpose_quads(x);
      for (int i = 0; i < 4; ++i) index[i] = (vb)x[i];
    }
  }

  // Keys of groups of 16 tokens: vectors `high` and `low` on of each group's `group_bytes`.
  static void decode_keys(const FqCode& code, int num_subvecs, const Records* groups,
                          int num_groups, int64_t group_bytes, int high, int low, uint8_t* tile) {
    const int bytes = (num_subvecs * kBits + 7) / 8, num_units = ceil_div(num_subvecs, 4);
    for (int round = 0; round < kRounds; ++round) {
      Table table[4];
      load_tables(code, round, splat_byte(0x80), table);
      for (int g = 0; g < num_groups; ++g) {
        uint8_t* base = tile + g * group_bytes;
        Records r = groups[g];
        for (int unit = 0; unit < num_units; unit += 4) {
          const int left = bytes - unit * kUnitBytes;
          vb index[4], signs[4];
          load_units(r, left < kChunkBytes ? left : kChunkBytes, index, signs);
          r.at += kChunkBytes;
          for (int u = 0; u < 4 && unit + u < num_units; ++u) {
            uint8_t* out[4];
            for (int p = 0; p < 4; ++p) {
              const int first = is_low(p) ? low : high;
              out[p] = base + (first + (unit + u) * kDim + coordinate(round, p)) * 64;
            }
            look_up_all(table, index[u], signs[u], out);
          }
        }
      }
    }
  }

  // Values of a group of 16 tokens: four times all vectors of four tokens.
  static void decode_values(const FqCode& code, int num_subvecs, const Records* groups,
                            int num_groups, uint8_t* tile) {
    const int bytes = (num_subvecs * kBits + 7) / 8, columns = num_columns(code, num_subvecs);
    for (int round = 0; round < kRounds; ++round) {
      Table table[4];
      load_tables(code, round, vb{}, table);
      uint8_t* base = tile;
      for (int quad = 0; quad < 4 * num_groups; ++quad, base += columns * kPlaneBytes * 64) {
        const int64_t stride = groups[quad / 4].stride;
        const uint8_t* p = groups[quad / 4].at + quad % 4 * 4 * stride;
        for (int column = 0, at = 0; column < columns; column += kDim, at += kChunkBytes) {
          const int count = bytes - at < kChunkBytes ? bytes - at : kChunkBytes;
          vb index, signs = {};
          if constexpr (kFolded) {
            const vb a = expand(p + at, p + at + stride, count);
            const vb b = expand(p + at + 2 * stride, p + at + 3 * stride, count);
            index = permute(load_bytes(kQuads.at), a, b);
            signs = permute(load_bytes(kQuadSigns.at), a, b);
          } else {
            const uint8_t* const four[4] = {p + at, p + at + stride, p + at + 2 * stride,
                                            p + at + 3 * stride};
            index = permute(load_bytes(kQuads.at), load_four(four, count));
          }
          uint8_t* out[4];
          for (int i = 0; i < 4; ++i) {
            const int first = is_low(i) ? columns : 0;
            out[i] = base + (first + column + coordinate(round, i)) * 64;
          }
          look_up_all(table, index, signs, out);
        }
      }
    }
  }

  // Sums of the columns of 16 subvectors, x [kDim], to coordinates in their order.
  static void store_columns(vf* x, float* out) {
    if constexpr (kDim == 2) {
      const vi low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
      store(out, __builtin_shuffle(x[0], x[1], low));
      store(out + 16, __builtin_shuffle(x[0], x[1], low + 2));
    } else if constexpr (kDim == 4) {
      transpose_quads(x);
      for (int i = 0; i < 4; ++i) store(out + 16 * i, x[i]);
    } else {
      for (int s = 0; s < 16; ++s) {
        for (int c = 0; c < 8; ++c) out[8 * s + c] = x[c][s];
      }
    }
  }
};

// The code paths of one code.
struct ByteKernels {
  decltype(&ByteCode<4, false>::decode_keys) decode_keys;
  decltype(&ByteCode<4, false>::decode_values) decode_values;
  decltype(&ByteCode<4, false>::store_columns) store_columns;
};

template <int kDim, bool kFolded>
static constexpr ByteKernels kByteKernels = {ByteCode<kDim, kFolded>::decode_keys,
                                             ByteCode<kDim, kFolded>::decode_values,
                                             ByteCode<kDim, kFolded>::store_columns};

static ByteKernels byte_kernels(const FqCode& code) {
  if (code.subvec_dim == 2) return code.folded ? kByteKernels<2, true> : kByteKernels<2, false>;
  if (code.subvec_dim == 4) return code.folded ? kByteKernels<4, true> : kByteKernels<4, false>;
  return kByteKernels<8, false>;
}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
