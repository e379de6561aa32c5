// SPDX-License-Identifier: Apache-2.0
// What attention over mapped keys has beside attend.h: rows that prepare.h has made ready, and what
// a score has beside the code's part.
//
// The turning part of a tile's scores is one more product, S^T += T W. T [16, 16] holds cosines and
// sines of 8 pairs for the tile's 16 positions counted from its first one, W [16, 8 rows] what each
// row makes of them at that first position: its factors, turned on by the angle up to there.
#pragma once

#include "cuda/attend.h"

namespace fq {

// Of a score's turning part, a base-2 logarithm: of less, float16 may lose some.
constexpr float kLeastTurn = 1e-3f;

// Shared memory of a row block's map.
template <int kHeadDim, int kTiles>
struct MappedRows {
  static constexpr int kSteps = turn_steps(kHeadDim), kColumns = 8 * kTiles;
  uint8_t* fine;      // [kSteps, 32 lanes, 16 bytes]: T
  float* turns;       // [kTiles, kSteps, 32 lanes, 4]: rows' factors of two pairs, at position 0
  int32_t* columns;   // [kSteps * 8]: the pairs' columns in turn_coarse
  float* bias;        // [kColumns]: <q, m>
  float* turn_scale;  // [kColumns]: what turns were divided by, and factors of the code's part

  FQ_DEVICE static MappedRows at(uint8_t* memory) {
    MappedRows rows;
    rows.fine = memory;
    rows.turns = reinterpret_cast<float*>(memory + kSteps * kWarp * 16);
    rows.columns = reinterpret_cast<int32_t*>(rows.turns + kTiles * kSteps * kWarp * 4);
    rows.bias = reinterpret_cast<float*>(rows.columns + kSteps * 8);
    rows.turn_scale = rows.bias + kColumns;
    return rows;
  }

  // All threads of the CTA take part; a barrier must follow.
  FQ_DEVICE void load(const AttendArgs& args, const RowBlock& b, int group, int kv_head,
                      uint8_t* fragments, float* factors, int32_t* positions) const {
    load_turns(args, kv_head);
    for (int row = warp_idx(); row < kColumns; row += num_threads() / kWarp)
      load_row(args, b, group, kv_head, row, fragments, factors, positions);
  }

  // acc += the turning part of the scores of a tile. Both are over turn_scale.
  FQ_DEVICE void turn(const AttendArgs& args, int tile, float (&acc)[kTiles][4]) const {
    const FqCudaKeyMap& map = args.map;
    const int lane = lane_idx(), t = lane % 4;
    const int64_t row = (int64_t)(tile < map.num_steps ? tile : map.num_steps - 1) * map.num_pairs;
#pragma unroll 1
    for (int step = 0; step < map.num_turning / 8; ++step) {
      const Angle x = load_angle(map.turn_coarse, row + columns[8 * step + t]);
      const Angle y = load_angle(map.turn_coarse, row + columns[8 * step + 4 + t]);
      const Quad a = load_quad(fine + (step * kWarp + lane) * 16);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float w[4];
        load_floats(turns + ((i * kSteps + step) * kWarp + lane) * 4, w);
        mma(acc[i], a.x, a.y, a.z, a.w,
            to_half2(w[0] * x.cosine + w[1] * x.sine, w[1] * x.cosine - w[0] * x.sine),
            to_half2(w[2] * y.cosine + w[3] * y.sine, w[3] * y.cosine - w[2] * y.sine));
      }
    }
  }

 private:
  FQ_DEVICE void load_turns(const AttendArgs& args, int kv_head) const {
    const FqCudaKeyMap& map = args.map;
    for (int j = thread_idx(); j < map.num_turning; j += num_threads())
      columns[j] = load_turn(map, kv_head, j).column;
    for (int i = thread_idx(); i < map.num_turning * (kWarp / 8); i += num_threads()) {
      const int step = i / kWarp, lane = i % kWarp;
      uint32_t a[4];
      for (int r = 0; r < 4; ++r) {
        const int column = load_turn(map, kv_head, 8 * step + lane % 4 + r / 2 * 4).column;
        const int token = token_of(args.order, lane / 4 + r % 2 * 8);
        const Angle angle = load_angle(map.turn_fine, token * map.num_pairs + column);
        a[r] = to_half2(angle.cosine, angle.sine);
      }
      store_quad(fine + i * 16, {a[0], a[1], a[2], a[3]});
    }
  }

  FQ_DEVICE void load_row(const AttendArgs& args, const RowBlock& b, int group, int kv_head,
                          int row, uint8_t* fragments, float* factors, int32_t* positions) const {
    constexpr int kPerLane = kLaneCoords<kHeadDim>, kMmaSteps = kHeadDim / 16;
    const FqCudaKeyMap& map = args.map;
    const Prepared& from = args.prepared;
    const bool exists = row < b.num_rows;
    const int64_t at = exists ? state_row(args.call, b, group, kv_head, row) : 0;
    for (int i = 0; i < kPerLane; ++i) {
      const int coord = lane_idx() * kPerLane + i;
      if (coord >= map.num_coded) continue;
      int step = coord % (kHeadDim / 4) / 4, part = coord / (kHeadDim / 4);
      if (args.is_product) product_place(args.product, coord, &step, &part);
      uint8_t* to = fragments + (((row / 8) * kMmaSteps + step) * kWarp + row % 8 * 4 + part) * 8;
      reinterpret_cast<uint16_t*>(to)[coord % 4] = exists ? from.query[at * kHeadDim + coord] : 0;
    }
    float peak = 0.0f;
    for (int j = lane_idx(); exists && j < map.num_turning; j += kWarp) {
      const Angle w = load_angle(from.turns, at * map.num_turning + j);
      peak = maximum(peak, square_root(w.cosine * w.cosine + w.sine * w.sine));
    }
    peak = warp_max(peak);
    peak = maximum(peak, kLeastTurn);
    const float inverse = 1.0f / peak;
    for (int j = lane_idx(); j < map.num_turning; j += kWarp) {
      Angle w = {0.0f, 0.0f};
      if (exists) w = load_angle(from.turns, at * map.num_turning + j);
      float* to = turns + (((row / 8) * kSteps + j / 8) * kWarp + row % 8 * 4 + j % 4) * 4;
      to[j / 4 % 2 * 2] = w.cosine * inverse;
      to[j / 4 % 2 * 2 + 1] = w.sine * inverse;
    }
    if (lane_idx() == 0) {
      const float largest = exists ? from.constants[at * 2] : 0.0f;
      const float unit = args.is_product ? 1.0f : args.codec.key.table_scale;
      factors[row] = largest * args.call.scale * unit * kLog2e * inverse;
      positions[row] = exists ? b.context + (b.first_row + row) / group : -1;
      bias[row] = exists ? from.constants[at * 2 + 1] : 0.0f;
      turn_scale[row] = peak;
    }
  }
};

}  // namespace fq
