// SPDX-License-Identifier: Apache-2.0
// Which token of a tile of 16 stands in which row of the tensor core products.
//
// Any order gives the same result. It decides which record words the 32 lanes read at once, and so
// how many of them meet in a bank of shared memory. Orders are permutations of the four bits of a
// row's number, whose images add up: token(row + 8) = token(row) + token(8) for rows below 8. The
// best one depends on the record's size and on where a lane's indices begin in it; the launcher
// finds it once for every pair of codes. Where fields may begin between words, the count is an
// estimate: of the words in which they begin.
#pragma once

#include "cuda/codes.h"
#include "page_layout.h"

namespace fq {

constexpr int kTokens = 16;

struct TokenOrder {
  uint64_t tokens;  // that of row r in bits [4 r, 4 r + 4)

  // From the tokens of rows 1, 2, 4 and 8: 1, 2, 4 and 8 in some order.
  static TokenOrder of_bits(int row_1, int row_2, int row_4, int row_8) {
    TokenOrder order = {0};
    for (uint64_t row = 0; row < kTokens; ++row) {
      order.tokens |=
          ((row & 1) * row_1 + (row >> 1 & 1) * row_2 + (row >> 2 & 1) * row_4 + (row >> 3) * row_8)
          << (4 * row);
    }
    return order;
  }
};

FQ_BOTH int token_of(const TokenOrder& order, int row) {
  return (int)(order.tokens >> (4 * row)) & 15;
}

// How lanes read one side's indices: a code, and the coordinates of a lane.
struct IndexReads {
  int dim, bits, coords;
  int first_word(int part) const { return part * coords / dim * bits / 32; }
  // As Lookup: one word more where a lane's field does not begin and end with a word.
  int num_words() const {
    const int field_bits = (coords + dim - 1) / dim * bits;
    const bool aligned = coords % dim == 0 && field_bits % 32 == 0;
    return (field_bits + 31) / 32 + (aligned ? 0 : 1);
  }
};

// Wavefronts of one read of 32 words: the most different words in one bank.
inline int wavefronts(const int (&words)[32]) {
  int most = 0;
  for (int bank = 0; bank < 32; ++bank) {
    int here = 0;
    for (int i = 0; i < 32; ++i) {
      if (words[i] % 32 != bank) continue;
      bool is_new = true;
      for (int j = 0; j < i; ++j) is_new &= words[j] != words[i];
      here += is_new;
    }
    most = here > most ? here : most;
  }
  return most;
}

// Wavefronts in which a warp reads the indices of a tile, keys and values.
inline int index_wavefronts(const TokenOrder& order, const RecordLayout& layout, IndexReads key,
                            IndexReads value) {
  int sum = 0, words[32];
  for (int i = 0; i < 2; ++i) {
    for (int word = 0; word < key.num_words(); ++word) {
      for (int lane = 0; lane < 32; ++lane) {
        const int at = token_of(order, lane / 4 + 8 * i) * layout.record_bytes;
        words[lane] = at / 4 + key.first_word(lane % 4) + word;
      }
      sum += wavefronts(words);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int word = 0; word < value.num_words(); ++word) {
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane % 4 * 2 + (i & 1) + (i & 2) * 4;
        const int at = token_of(order, row) * layout.record_bytes + layout.value_index_offset;
        words[lane] = at / 4 + value.first_word(lane / 4) + word;
      }
      sum += wavefronts(words);
    }
  }
  return sum;
}

inline TokenOrder best_order(int head_dim, int key_kind, int value_kind) {
  constexpr int kDims[] = {
#define FQ_DIM(kind, dim, bits, folded, name) dim,
      FQ_CODES(FQ_DIM)
#undef FQ_DIM
  };
  constexpr int kBits[] = {
#define FQ_BITS(kind, dim, bits, folded, name) bits,
      FQ_CODES(FQ_BITS)
#undef FQ_BITS
  };
  const IndexReads key = {kDims[key_kind], kBits[key_kind], head_dim / 4};
  const IndexReads value = {kDims[value_kind], kBits[value_kind], head_dim / kWarp * kWarp / 8};
  const RecordLayout layout = record_layout(index_bytes(head_dim / key.dim, key.bits),
                                            index_bytes(head_dim / value.dim, value.bits));
  TokenOrder best = TokenOrder::of_bits(1, 2, 4, 8);
  int fewest = index_wavefronts(best, layout, key, value);
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 4; ++b) {
      for (int c = 0; c < 4; ++c) {
        if (a == b || a == c || b == c) continue;
        const TokenOrder order = TokenOrder::of_bits(1 << a, 1 << b, 1 << c, 1 << (6 - a - b - c));
        const int found = index_wavefronts(order, layout, key, value);
        if (found < fewest) best = order, fewest = found;
      }
    }
  }
  return best;
}

}  // namespace fq
