// SPDX-License-Identifier: Apache-2.0
// Keys coded through a map (FqCudaKeyMap): without their mean, and with a transform as a product
// code, whose subvectors are the shorter the more their coordinates matter.
//
// A score is then <w, z> + <q, m> + <q, R_p c>. w, <q, m> and what q makes of R_p c are one row's:
// prepare.h computes them once, and `Prepared` is where. Tokens below num_plain are coded in
// another way; prepare.h attends them itself.
//
// A lane's coordinates of a product code. Quads of four coordinates go to the four lanes of a
// group in turn, so that all of them read codewords of one length in a step: 16 coordinates a step,
// of codewords of 8 coordinates 32 in two steps, whose halves a lane takes one after the other.
#pragma once

#include "cuda/codes.h"
#include "cuda/params.h"

namespace fq {

constexpr int kMaxPlain = 16;  // a block holds them
constexpr int kTurnTile = 16;  // positions of a row of turn_coarse

// Pairs of coordinates whose mean turns: at most a quarter as many as there are coordinates.
constexpr int turn_steps(int head_dim) { return (head_dim + 31) / 32; }  // of 8 pairs, one product

struct Angle {
  float cosine, sine;
};

FQ_DEVICE Angle load_angle(const float* table, int64_t at) {
  const Pair x = load_pair(table + at * 2);
  return {bits_to_float(x.x), bits_to_float(x.y)};
}

// How far a pair turns up to a position.
FQ_DEVICE Angle angle_at(const FqCudaKeyMap& map, int column, int64_t position) {
  const Angle a = load_angle(map.turn_coarse, position / kTurnTile * map.num_pairs + column);
  const Angle b = load_angle(map.turn_fine, position % kTurnTile * map.num_pairs + column);
  return {a.cosine * b.cosine - a.sine * b.sine, a.sine * b.cosine + a.cosine * b.sine};
}

struct TurnPair {
  int first, second, column;  // first is -1 where there is no pair
  float c0, c1;
};

FQ_DEVICE TurnPair load_turn(const FqCudaKeyMap& map, int head, int j) {
  const int64_t at = (int64_t)head * map.num_turning + j;
  const Quad pair = load_quad(map.turn_pairs + at * 4);
  const Pair c = load_pair(map.turn_mean + at * 2);
  return {(int)pair.x, (int)pair.y, (int)pair.z, bits_to_float(c.x), bits_to_float(c.y)};
}

// Where each row's numbers are: row = token * num_q_heads + head.
struct Prepared {
  uint16_t*
      query;  // float16 [rows, head_dim]: w, or the rotated query, over its largest coordinate
  float* constants;  // [rows, 2]: that coordinate; <q, m>, a base-2 logarithm as scores are
  float* turns;      // [rows, num_turning, 2]: factors of cosines and sines, as <q, m>
  float* first_o;    // [rows, head_dim]: states of the first tokens, as FqCudaAttend's raw ones
  float* first_m;    // [rows]
  float* first_l;    // [rows]

  static constexpr int64_t floats(int head_dim, int num_turning) {
    return head_dim / 2 + 2 + 2 * num_turning + head_dim + 2;
  }
  // Of a layer without a map: the states alone, head_dim + 2 floats a row.
  FQ_BOTH static Prepared states_at(float* base, int64_t rows, int head_dim) {
    Prepared p = {};
    p.first_o = base;
    p.first_m = base + rows * head_dim;
    p.first_l = p.first_m + rows;
    return p;
  }
  FQ_BOTH static Prepared at(float* base, int64_t rows, int head_dim, int num_turning) {
    Prepared p;
    p.query = reinterpret_cast<uint16_t*>(base);
    p.first_o = base + rows * (head_dim / 2);
    p.turns = p.first_o + rows * head_dim;
    p.constants = p.turns + rows * 2 * num_turning;
    p.first_m = p.constants + rows * 2;
    p.first_l = p.first_m + rows;
    return p;
  }
};

// Coordinate `coord` of the direction whose packed indices begin at `field`.
FQ_DEVICE float decode_coordinate(const FqCudaCode& code, const uint8_t* field, int coord) {
  const int within = coord % code.subvec_dim, bit = coord / code.subvec_dim * code.index_bits;
  const uint8_t* byte = field + bit / 8;  // a norm, or more, follows the field
  const uint32_t bits = byte[0] | (uint32_t)byte[1] << 8 | (uint32_t)byte[2] << 16;
  const uint32_t index = bits >> bit % 8;
  const float x = code.rows[(index & 255) * code.subvec_dim + within];
  return code.folded && index >> (8 + within) & 1 ? -x : x;
}

// The tables of a product code, in the keys' side of the rows of codes.h: so many copies of each
// codeword, and where in the side's 128 bytes they begin.
struct Product {
  int32_t end_2, end_4, end_8;  // steps
  int32_t at_2, at_4, at_8;     // bytes
  int32_t copies_2, copies_4, copies_8;

  static Product of(const FqCudaKeyMap& map) {
    const int n2 = map.num_subvecs[0], n4 = map.num_subvecs[1], n8 = map.num_subvecs[2];
    Product p = {n2 * 2 / 16, n2 * 2 / 16 + n4 * 4 / 16, 0, 0, 0, 0, 0, 0, 0};
    p.end_8 = p.end_4 + n8 * 8 / 16;
    const int bytes_8 = n8 ? kSideBytes / 2 : 0;
    const int bytes_4 = n4 ? (kSideBytes - bytes_8) / 2 : 0;
    const int bytes_2 = kSideBytes - bytes_8 - bytes_4;
    p.copies_8 = bytes_8 / 16;
    p.copies_4 = bytes_4 / 8;
    p.copies_2 = bytes_2 / 4;
    p.at_4 = bytes_8;
    p.at_2 = bytes_8 + bytes_4;
    return p;
  }
  // Whether every step has codewords of one length.
  static bool fits(const FqCudaKeyMap& map) {
    const int n2 = map.num_subvecs[0], n4 = map.num_subvecs[1], n8 = map.num_subvecs[2];
    return n2 % 8 == 0 && n4 % 4 == 0 && n8 % 4 == 0 && n2 * 2 + n4 * 4 + n8 * 8 == map.num_coded;
  }
};

// Fills the keys' side of the tables. All threads of the CTA take part.
FQ_DEVICE void fill_product(uint8_t* tables, const FqCudaKeyMap& map, const Product& p) {
  for (int i = thread_idx(); i < kRows * (kSideBytes / 4); i += num_threads()) {
    const int row = i / (kSideBytes / 4), byte = i % (kSideBytes / 4) * 4;
    const bool is_8 = byte < p.at_4, is_4 = !is_8 && byte < p.at_2;
    const FqCudaCode& code = map.codes[is_8 ? 2 : is_4 ? 1 : 0];
    const int size = 2 * code.subvec_dim;
    const int within = (byte - (is_8 ? 0 : is_4 ? p.at_4 : p.at_2)) % size;
    *reinterpret_cast<uint32_t*>(tables + row * kTableStride + byte) =
        load_as<uint32_t>(reinterpret_cast<const uint8_t*>(code.table) + row * size + within);
  }
}

// Where coordinate `coord` of a product code is: the step, and the lane of the group of four.
FQ_DEVICE void product_place(const Product& p, int coord, int* step, int* lane) {
  *step = coord / 16;
  *lane = coord / 4 % 4;
  const int beyond = coord - p.end_4 * 16;
  if (beyond >= 0) {
    *step = p.end_4 + beyond / 32 * 2 + beyond / 4 % 2;
    *lane = beyond / 8 % 4;
  }
}

// As score_tile of attend.h, for a product code. `own` is where the record of this lane's row g
// begins.
template <int kTiles>
FQ_DEVICE void score_product(const uint8_t* tables, const uint8_t* own, int bytes_8,
                             const uint8_t* fragments, int steps, const Product& p,
                             float (&acc)[kTiles][4]) {
  [[maybe_unused]] constexpr int kUnroll = kTiles == 1 ? 2 : 1;
  const int lane = lane_idx(), t = lane % 4;
  const auto multiply = [&](int step, Pair a, Pair b) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Pair q = load_pair(fragments + ((i * steps + step) * kWarp + lane) * 8);
      mma(acc[i], a.x, b.x, a.y, b.y, q.x, q.y);
    }
  };
  const uint8_t* field = own + 2 * t;
  const uint32_t copy_2 = (uint32_t)(p.at_2 + lane % p.copies_2 * 4);
#pragma unroll(kUnroll)
  for (int step = 0; step < p.end_2; ++step, field += 8) {
    const uint32_t x = load_as<uint16_t>(field), y = load_as<uint16_t>(field + bytes_8);
    const Pair a = {load_as<uint32_t>(tables + permute_bytes(x, copy_2, 0x5504)),
                    load_as<uint32_t>(tables + permute_bytes(x, copy_2, 0x5514))};
    const Pair b = {load_as<uint32_t>(tables + permute_bytes(y, copy_2, 0x5504)),
                    load_as<uint32_t>(tables + permute_bytes(y, copy_2, 0x5514))};
    multiply(step, a, b);
  }
  field -= t;
  const uint32_t copy_4 = (uint32_t)(p.at_4 + (p.copies_4 ? lane % p.copies_4 : 0) * 8);
#pragma unroll(kUnroll)
  for (int step = p.end_2; step < p.end_4; ++step, field += 4) {
    const Pair a = load_pair(tables + permute_bytes(field[0], copy_4, 0x5504));
    const Pair b = load_pair(tables + permute_bytes(field[bytes_8], copy_4, 0x5504));
    multiply(step, a, b);
  }
  const uint32_t copy_8 = (uint32_t)(p.at_8 + (p.copies_8 ? lane % p.copies_8 : 0) * 16);
#pragma unroll 1
  for (int step = p.end_4; step < p.end_8; step += 2, field += 4) {
    const Quad a = load_quad(tables + permute_bytes(field[0], copy_8, 0x5504));
    const Quad b = load_quad(tables + permute_bytes(field[bytes_8], copy_8, 0x5504));
    multiply(step, {a.x, a.y}, {b.x, b.y});
    multiply(step + 1, {a.z, a.w}, {b.z, b.w});
  }
}

}  // namespace fq
