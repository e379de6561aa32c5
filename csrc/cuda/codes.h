// SPDX-License-Identifier: Apache-2.0
// From packed indices in shared memory to float16 registers of a tensor core product.
//
// Both codebooks are replicated over the banks: row r of the tables is 256 bytes,
//   [copies of key row r, 128 bytes] [copies of value row r, 128 bytes]
// and a lane reads the whole copy in its own banks, so that 32 lanes never conflict, whatever the
// indices. (Where two lanes share a codeword, at head_dim 96 with subvectors of 8, they read
// halves, and two lanes may meet.) A row's address is one byte permutation: byte 0 the lane's copy,
// byte 1 the index.
#pragma once

#include "cuda/supported.h"
#include "cuda/warp.h"

namespace fq {

// Whether records, and their fields, may begin at any even address: a multiple of 4 elsewhere.
template <int kHeadDim>
constexpr bool kOddRecords = kHeadDim % 32 != 0;

constexpr int kTableStride = 256, kSideBytes = 128;
constexpr int kTableBytes = kRows * kTableStride;

// Fills one side of the tables from float16 [kRows, dim]. All threads of the CTA take part.
FQ_DEVICE void fill_table(uint8_t* tables, int side, const uint16_t* rows, int dim) {
  constexpr int kChunks = kSideBytes / 16;
  for (int i = thread_idx(); i < kRows * kChunks; i += num_threads()) {
    const int row = i / kChunks;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(rows + row * dim);
    Quad chunk;
    if (dim == 8) {
      chunk = load_quad(source);
    } else if (dim == 4) {
      const Pair c = load_pair(source);
      chunk = {c.x, c.y, c.x, c.y};
    } else {
      const uint32_t c = load_as<uint32_t>(source);
      chunk = {c, c, c, c};
    }
    store_quad(tables + row * kTableStride + side * kSideBytes + i % kChunks * 16, chunk);
  }
}

// Reads kBits bits of a field at an even address, from bit `first` on, as words; no word that holds
// none of them is touched, for what lies behind a record may be under way.
template <int kBits>
FQ_DEVICE void read_bits(const uint8_t* field, uint32_t first,
                         uint32_t (&words)[(kBits + 31) / 32]) {
  const uint32_t odd = (uint32_t)(uintptr_t)field & 2;
  const uint32_t begin = first + 8 * odd, shift = begin % 32;
  const uint32_t* p = reinterpret_cast<const uint32_t*>(field - odd) + begin / 32;
  uint32_t low = load_as<uint32_t>(p);
#pragma unroll
  for (int i = 0; i < (kBits + 31) / 32; ++i) {
    uint32_t high = 0;
    if (shift + kBits > 32 * (uint32_t)(i + 1)) high = load_as<uint32_t>(p + i + 1);
    words[i] = shift_right(low, high, shift);
    low = high;
  }
}

// The bytes of a lane's copy within a side of a row.
FQ_DEVICE uint32_t lane_copy(int dim) {
  return (uint32_t)(lane_idx() % (kSideBytes / (2 * dim)) * 2 * dim);
}

// Whether a lane begins with the second half of a value's codewords of 8 coordinates.
FQ_DEVICE int swap_halves() { return lane_idx() / 8 % 2; }

// kCoords coordinates of one vector, at a place that depends on the lane, as indices in registers.
//
// Field of a lane: bits [part * kFieldBits, ...) of the vector's packed indices. Where that is not
// the first bit of a subvector (head_dim 96 with subvectors of 8), it is moved to it, and `skip` is
// the half of the codeword to begin with.
//
// kOdd: kOddRecords of the whole vector.
template <int kKind, int kCoords, bool kIsValue, bool kOdd>
struct Lookup {
  using C = Code<kKind>;
  static constexpr bool kSplit = kCoords % C::kDim != 0;  // codewords shared by two lanes
  static constexpr int kSubvecs = (kCoords + C::kDim - 1) / C::kDim;
  static constexpr int kFieldBits = kSubvecs * C::kBits;
  static constexpr int kWords = (kFieldBits + 31) / 32;
  static constexpr bool kAligned = !kSplit && !kOdd && kFieldBits % 32 == 0;
  static constexpr int kQuads = kCoords / 4;
  // Codewords of 8 coordinates are two quads. Were all lanes to read the same half, 16 of them
  // would meet in 16 banks. Of keys, a lane reads both halves at once. Of values, whose coordinates
  // are rows of a product and in any order, lanes 8 to 15 of every 16 begin with the other half.
  static constexpr int kTogether = C::kDim == 8 && !kSplit && !kIsValue ? 2 : 1;
  static constexpr bool kSwaps = C::kDim == 8 && !kSplit && kIsValue;
  static_assert(!kSplit || (C::kDim == 8 && kCoords % 4 == 0));

  const uint8_t* side;  // the tables, or kSideBytes beyond them for values
  uint32_t copy;
  int first_word;
  uint32_t shift, skip;

  FQ_DEVICE static Lookup make(const uint8_t* tables, int part) {
    Lookup at;
    at.side = tables + kIsValue * kSideBytes;
    at.copy = lane_copy(C::kDim);
    if (kSwaps) at.copy += swap_halves() * 8;
    const int coord = part * kCoords;
    const int bit = coord / C::kDim * C::kBits;
    at.first_word = bit / 32;
    at.shift = (uint32_t)bit % 32;
    at.skip = kSplit ? (uint32_t)(coord % C::kDim) / 4 : 0;
    return at;
  }

  // Reads a lane's indices of a vector whose field begins at `field`, 4-byte aligned but for kOdd.
  // May read one word beyond the field: in a record the norms, or the other field, follow.
  FQ_DEVICE void read(const uint8_t* field, uint32_t (&words)[kWords]) const {
    if constexpr (kOdd) {
      read_bits<kFieldBits>(field, 32 * (uint32_t)first_word + shift, words);
      return;
    }
    const uint32_t* p = reinterpret_cast<const uint32_t*>(field) + first_word;
    if (kAligned) {
      for (int i = 0; i < kWords; ++i) words[i] = load_as<uint32_t>(p + i);
    } else {
      uint32_t low = load_as<uint32_t>(p);
      for (int i = 0; i < kWords; ++i) {
        const uint32_t high = load_as<uint32_t>(p + i + 1);
        words[i] = shift_right(low, high, shift);
        low = high;
      }
    }
  }

  // kTogether quads from number `first` on, which is a multiple of it.
  FQ_DEVICE void quads(const uint32_t (&words)[kWords], int first, Pair (&out)[kTogether]) const {
    if constexpr (kTogether == 2) {
      const Quad c = load_quad(row(words, first / 2));
      out[0] = {c.x, c.y};
      out[1] = {c.z, c.w};
    } else {
      out[0] = quad(words, first);
    }
  }

  // Four coordinates, 4 * quad to 4 * quad + 3 of the lane's, as float16 pairs (0 1) and (2 3).
  FQ_DEVICE Pair quad(const uint32_t (&words)[kWords], int quad) const {
    if constexpr (C::kDim == 2) {
      const int i = 2 * quad;
      return {load_as<uint32_t>(row(words, i)) ^ signs(words, i, 0),
              load_as<uint32_t>(row(words, i + 1)) ^ signs(words, i + 1, 0)};
    } else if constexpr (C::kDim == 4) {
      const Pair c = load_pair(row(words, quad));
      return {c.x ^ signs(words, quad, 0), c.y ^ signs(words, quad, 2)};
    } else if constexpr (!kSplit) {
      return load_pair(side + (offset(words, quad / 2) ^ (uint32_t)quad % 2 * 8));
    } else {  // which codeword depends on the lane
      const uint32_t half = (uint32_t)quad + skip;
      const uint8_t* even = row(words, quad / 2);
      const uint8_t* odd = row(words, (quad + 1) / 2 < kSubvecs ? (quad + 1) / 2 : quad / 2);
      return load_pair((skip ? odd : even) + half % 2 * 8);
    }
  }

 private:
  // Index number i in the low bits, other bits above it.
  FQ_DEVICE static uint32_t index(const uint32_t (&words)[kWords], int i) {
    const int bit = i * C::kBits, word = bit / 32, offset = bit % 32;
    if (offset + C::kBits <= 32) return words[word] >> offset;
    return shift_right(words[word], words[word + 1 < kWords ? word + 1 : word], offset);
  }
  // Where this lane's copy of the row of index number i begins; the row's number is the low byte
  // of the index.
  FQ_DEVICE uint32_t offset(const uint32_t (&words)[kWords], int i) const {
    if (C::kBits == 8)  // no shift
      return permute_bytes(words[i / 4], copy, 0x5504 | (uint32_t)(i % 4) << 4);
    return permute_bytes(index(words, i), copy, 0x5504);
  }
  FQ_DEVICE const uint8_t* row(const uint32_t (&words)[kWords], int i) const {
    return side + offset(words, i);
  }
  // Sign bits of coordinates `first` (0 or 2) and first + 1, which are bits 8 + first and 9 + first
  // of the index, where float16 pairs have theirs. One product makes both shifts: its two terms
  // have no bit in common.
  FQ_DEVICE static uint32_t signs(const uint32_t (&words)[kWords], int i, int first) {
    if (!C::kFolded) return 0;
    const uint32_t pattern = index(words, i) & ((1u << C::kBits) - 256);
    return pattern * (1u << (7 - first) | 1u << (22 - first)) & 0x80008000;
  }
};

// Two coordinates of a value vector, `coord`, which is even, and the next, as a float16 pair; of a
// vector whose field begins at `field`, an even address.
template <int kKind>
FQ_DEVICE uint32_t load_two(const uint8_t* values, const uint8_t* field, int coord) {
  using C = Code<kKind>;
  uint32_t index[1];
  read_bits<C::kBits>(field, (uint32_t)(coord / C::kDim) * C::kBits, index);
  const uint32_t row = permute_bytes(index[0], lane_copy(C::kDim), 0x5504),
                 within = coord % C::kDim;
  const uint32_t pair = load_as<uint32_t>(values + row + 2 * within);
  if (!C::kFolded) return pair;
  const uint32_t pattern = (index[0] & ((1u << C::kBits) - 256)) >> within;  // as Lookup::signs
  return pair ^ (pattern * (1u << 7 | 1u << 22) & 0x80008000);
}

}  // namespace fq
