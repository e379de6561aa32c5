// SPDX-License-Identifier: Apache-2.0
// The attention kernel (attend.h explains it) and the merge of a CTA's warps.
#pragma once

#include "cuda/attend.h"
#include "cuda/mapped.h"
#include "cuda/merge.h"

namespace fq {

// The state of one warp: per lane, of the columns 2t and 2t + 1 of each tile of 8 rows.
template <int kHeadDim, int kTiles>
struct WarpState {
  static constexpr int kSteps = kHeadDim / 16;
  float m[kTiles][2], l[kTiles][2];  // l: this lane's part, summed over the warp at the end
  float o[kTiles][kSteps][4];        // in units of top
  float top;                         // largest value norm met, the same in all lanes; never 0
};

// The records of a pair of codes: where a pair has kernels of its own, their sizes are constants.
template <int kHeadDim, int kKeyKind, int kValueKind>
struct RecordsOf {
  static constexpr bool kKnown = kKeyKind < kNumKinds && kValueKind < kNumKinds;
  using K = Code<kKnown ? kKeyKind : kK2>;
  using V = Code<kKnown ? kValueKind : kK2>;
  static constexpr RecordLayout kLayout = record_layout(index_bytes(kHeadDim / K::kDim, K::kBits),
                                                        index_bytes(kHeadDim / V::kDim, V::kBits));

  FQ_DEVICE static RecordLayout layout(const RecordLayout& given) {
    if constexpr (kKnown) {
      constexpr RecordLayout known = kLayout;
      return known;
    } else {
      return given;
    }
  }

  // Starts the copy of a tile of records; all lanes of the warp take part.
  FQ_DEVICE static void copy(uint8_t* to, const uint8_t* from, int record_bytes) {
    constexpr int kRound = kWarp * 16;
    const int own = lane_idx() * 16, bytes = kTokens * record_bytes;
    if constexpr (kKnown) {
      to += own;
      from += own;
#pragma unroll
      for (int i = 0; i < kTokens * kLayout.record_bytes; i += kRound) {
        if (i + kRound <= bytes || i + own < bytes) copy_async(to + i, from + i);
      }
    } else {
      for (int i = own; i < bytes; i += kRound) copy_async(to + i, from + i);
    }
  }
};

// The largest score of a row, and the sum of its weights relative to it, over all warps.
FQ_DEVICE void sum_up(const float* factors, int num_warps, int column, float* m, float* l) {
  *m = kEmpty;
  *l = 0.0f;
  for (int w = 0; w < num_warps; ++w) *m = maximum(*m, factors[(w * 8 + column) * 3]);
  for (int w = 0; w < num_warps; ++w) {
    const float* f = factors + (w * 8 + column) * 3;
    if (f[1] != 0.0f) *l += f[1] * exp2_fast(f[0] - *m);  // NaN is not 0
  }
}

// Merges the warps' states. Stores the split's, or, where there is one split alone, the outputs.
// `scratch` is kTableBytes, `factors` 24 floats a warp. All threads take part; nothing else in
// shared memory is alive.
template <int kHeadDim, int kTiles>
FQ_DEVICE void store_state(const AttendArgs& args, const RowBlock& b, int group, int kv_head,
                           int split, WarpState<kHeadDim, kTiles>& s, float* scratch,
                           float* factors) {
  constexpr int kSteps = kHeadDim / 16, kPerLane = kLaneCoords<kHeadDim>;
  constexpr int kWhole = kWholeCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  const int g = lane_idx() / 4, t = lane_idx() % 4, num_warps = num_threads() / kWarp;
  const bool swaps = args.value_kind == kK8 && kWhole / 8 % 8 == 0;  // as Lookup::kSwaps
  const int swap = swaps ? 2 * swap_halves() : 0;                    // of pairs of coordinates
  float* own = scratch + warp_idx() * 8 * kHeadDim;                  // [8, kHeadDim]
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile > 0) sync_cta();  // the scratch is free: of tile 0 the caller's barrier says so
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      for (int mask = 4; mask < kWarp; mask *= 2) s.l[tile][c] += shuffle_xor(s.l[tile][c], mask);
      if (g == 0) {
        float* f = factors + (warp_idx() * 8 + 2 * t + c) * 3;
        f[0] = s.m[tile][c];
        f[1] = s.l[tile][c];
        f[2] = s.top;
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int step = i < kWhole / 16 ? i ^ swap : i;
        float* to = own + (2 * t + c) * kHeadDim + value_coord<kHeadDim>(g, step);
        to[0] = s.o[tile][i][c];
        to[1] = s.o[tile][i][c + 2];
      }
    }
    sync_cta();
    for (int i = thread_idx(); i < 8 * kHeadDim; i += num_threads()) {
      const int column = i / kHeadDim, coord = i % kHeadDim, row = tile * 8 + column;
      if (row >= b.num_rows) continue;
      float m, l, o = 0.0f;
      sum_up(factors, num_warps, column, &m, &l);
      for (int w = 0; w < num_warps; ++w) {
        const float* f = factors + (w * 8 + column) * 3;
        if (f[1] == 0.0f) continue;
        o += scratch[(w * 8 + column) * kHeadDim + coord] * (exp2_fast(f[0] - m) * f[2]);
      }
      if (a.num_splits == 1) {
        scratch[i] = o;  // no other thread reads this element
        continue;
      }
      const int64_t at = state_row(a, b, group, kv_head, row) * a.num_splits + split;
      a.state_o[at * kHeadDim + coord] = o;
      if (coord == 0) {
        a.state_ml[at * 2] = m;
        a.state_ml[at * 2 + 1] = l;
      }
    }
    if (a.num_splits > 1) continue;
    sync_cta();
    for (int column = warp_idx(); column < 8; column += num_warps) {
      const int row = tile * 8 + column;
      if (row >= b.num_rows) break;
      float m, l, o[kPerLane], *merged = scratch + column * kHeadDim;
      sum_up(factors, num_warps, column, &m, &l);
      load_own<kHeadDim>(merged, o);
      write_row<kHeadDim>(args, state_row(a, b, group, kv_head, row), m, l, o, merged);
    }
  }
}

// grid [row blocks, num_kv_heads, num_splits], a whole number of warps per CTA.
template <int kHeadDim, int kKeyKind, int kValueKind, int kTiles, int kMapped>
FQ_KERNEL((AttendShape<kHeadDim, kTiles, kMapped>::kMaxWarps * kWarp), 1)
attend(FQ_PARAM AttendArgs args) {
  using Shape = AttendShape<kHeadDim, kTiles, kMapped>;
  constexpr int kSteps = Shape::kSteps;
  const FqCudaAttend& a = args.call;
  const int kv_head = cta_idx().y, split = cta_idx().z;
  const int group = a.num_q_heads / args.pages.num_kv_heads;
  const RowBlock b = RowBlock::find(a, group, Shape::kColumns, cta_idx().x);
  if (b.num_rows <= 0) return;

  // Positions that some row sees, [begin, end); tiles of this split, [tile_begin, tile_end).
  const int oldest = b.context + b.first_row / group;
  const int newest = b.context + (b.first_row + b.num_rows - 1) / group;
  int begin = first_seen(a.reach, oldest);
  const int least = args.num_apart;  // those before it are in the raw state
  if (begin < least) begin = least;
  const int end = args.has_raw ? b.context : newest + 1;
  // Those that every row sees, [all_begin, all_end): their tiles need no mask.
  int all_begin = first_seen(a.reach, newest);
  if (all_begin < least) all_begin = least;
  int all_end = oldest < end ? oldest + 1 : end;
  if (a.copy_table) {  // of those with copies some codes are not read
    const int recent = b.context - (a.num_copy_columns - a.num_copied_first);
    if (all_begin < a.num_copied_first) all_begin = a.num_copied_first;
    if (all_end > recent) all_end = recent;
  }
  const int first_tile = begin / kTokens;
  const int last_tile = end > begin ? (end + kTokens - 1) / kTokens : first_tile;
  const int per_split = (last_tile - first_tile + a.num_splits - 1) / a.num_splits;
  const int tile_begin = first_tile + split * per_split;
  const int tile_end = tile_begin + per_split < last_tile ? tile_begin + per_split : last_tile;
  if (tile_begin >= tile_end && a.num_splits == 1) {
    for (int row = warp_idx(); row < b.num_rows; row += num_threads() / kWarp) {
      float nothing[kLaneCoords<kHeadDim>] = {};
      float* scratch = reinterpret_cast<float*>(shared_memory()) + warp_idx() * kHeadDim;
      write_row<kHeadDim>(args, state_row(a, b, group, kv_head, row), kEmpty, 0.0f, nothing,
                          scratch);
    }
    return;
  }
  if (tile_begin >= tile_end) {
    for (int row = thread_idx(); row < b.num_rows; row += num_threads()) {
      float* ml = a.state_ml + (state_row(a, b, group, kv_head, row) * a.num_splits + split) * 2;
      ml[0] = kEmpty;
      ml[1] = 0.0f;
    }
    return;
  }

  // ---- memory, tables, queries
  using Records = RecordsOf<kHeadDim, kKeyKind, kValueKind>;
  const RecordLayout layout = Records::layout(args.layout);
  const int record_bytes = layout.record_bytes, num_warps = num_threads() / kWarp;
  uint8_t* tables = shared_memory();
  uint8_t* fragments = tables + kTableBytes;
  float* factors = reinterpret_cast<float*>(fragments + Shape::kQueryBytes);
  int32_t* positions = reinterpret_cast<int32_t*>(factors + Shape::kColumns);
  uint8_t* rings = tables + Shape::kFixedBytes;
  uint8_t* ring = rings + warp_idx() * (kStages * kTokens * record_bytes);
  const auto mapped = MappedRows<kHeadDim, kTiles>::at(rings - Shape::kTurnBytes);
  const bool is_product =
      kKeyKind == kProduct || (kMapped && kKeyKind == kAnyKind && args.is_product);
  if (is_product) {
    fill_product(tables, args.map, args.product);
  } else {
    fill_table(tables, 0, args.codec.key.table, args.codec.key.subvec_dim);
  }
  fill_table(tables, 1, args.codec.value.table, args.codec.value.subvec_dim);
  if constexpr (kMapped) {
    mapped.load(args, b, group, kv_head, fragments, factors, positions);
  } else {
    load_queries<kHeadDim, kTiles>(args, b, group, kv_head, fragments, factors, positions,
                                   reinterpret_cast<float*>(ring));
  }
  sync_cta();

  const int lane = lane_idx(), g = lane / 4, t = lane % 4;
  const int key_bytes = token_of(args.order, g) * record_bytes;
  const int value_bytes = token_of(args.order, 2 * t) * record_bytes + layout.value_index_offset;
  Pair held[kTiles == 1 && kKeyKind != kProduct ? kSteps : 1];
  if constexpr (kTiles == 1 && kKeyKind != kProduct) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) held[i] = load_pair(fragments + (i * kWarp + lane) * 8);
  }
  WarpState<kHeadDim, kTiles> s;
  float factor[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      s.m[i][c] = kEmpty;
      s.l[i][c] = 0.0f;
      factor[i][c] = factors[8 * i + 2 * t + c];
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      for (int c = 0; c < 4; ++c) s.o[i][j][c] = 0.0f;
    }
  }
  s.top = kLeastNorm;

  // Where the tile that is fetched next is: entry of the block table, tile of that block.
  // A step of num_warps tiles is added to both, which spares a division per tile.
  int entry = (tile_begin + warp_idx()) / args.tiles_per_block;
  int within = (tile_begin + warp_idx()) % args.tiles_per_block;
  // Starts the copy of the next tile into a stage of the ring. Returns whether it exists: not when
  // the block table does not lead into the cache.
  const auto fetch = [&](int tile, int stage) {
    int64_t block = -1;
    if (tile < tile_end && entry < a.table_width)
      block = a.block_table[b.req * a.stride_block_table + entry];
    const bool exists = block >= 0 && block < args.pages.num_blocks;
    if (exists) {
      const uint8_t* from = args.pages.base + block * args.pages.stride_block +
                            kv_head * args.pages.stride_head + within * kTokens * record_bytes;
      uint8_t* to = ring + stage * kTokens * record_bytes;
      Records::copy(to, from, record_bytes);
    }
    commit_copies();
    entry += args.step_blocks;
    within += args.step_tiles;
    if (within >= args.tiles_per_block) {
      within -= args.tiles_per_block;
      ++entry;
    }
    return exists;
  };

  uint32_t known = 0;  // bit s: the tile in stage s exists
  for (int i = 0; i < kStages - 1; ++i)
    known |= (uint32_t)fetch(tile_begin + warp_idx() + i * num_warps, i) << i;
  int stage = 0;
  for (int tile = tile_begin + warp_idx(); tile < tile_end; tile += num_warps) {
    sync_warp();  // the stage that is fetched into has been read by all lanes
    const int next = stage == 0 ? kStages - 1 : stage - 1;
    const uint32_t there = fetch(tile + (kStages - 1) * num_warps, next);
    known = (known & ~(1u << next)) | there << next;
    wait_copies<kStages - 1>();
    sync_warp();
    const uint8_t* records = ring + stage * kTokens * record_bytes;
    const bool exists = known >> stage & 1;
    stage = stage + 1 == kStages ? 0 : stage + 1;

    // ---- scores of rows g and g + 8
    float acc[kTiles][4] = {};
    if (is_product) {
      score_product(tables, records + key_bytes, args.bytes_8, fragments, kSteps, args.product,
                    acc);
    } else if constexpr (kKeyKind != kProduct) {
      with_kind<kKeyKind>(args.key_kind,
                          ScoreTile<kHeadDim, kTiles>{tables, records + key_bytes, args.bytes_8,
                                                      fragments, held, acc});
    }
    const int first = tile * kTokens;
    const auto token_of_row = [&](int r) {
      return first + token_of(args.order, only_here(g) + 8 * r);
    };
    const bool whole = exists && first >= all_begin && first + kTokens <= all_end;
    float key_norm[2], value_norm[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint8_t* at = records + key_bytes + r * args.bytes_8 + layout.key_norm_offset;
      uint32_t norms;
      if constexpr (kOddRecords<kHeadDim>) {
        norms = load_as<uint16_t>(at) | (uint32_t)load_as<uint16_t>(at + 2) << 16;
      } else {
        norms = load_as<uint32_t>(at);
      }
      key_norm[r] = from_half((uint16_t)norms);
      value_norm[r] = from_half((uint16_t)(norms >> 16));
      if (whole) continue;
      const int token = token_of_row(r);
      const bool inside = token >= begin && token < end;
      if (!exists) key_norm[r] = bits_to_float(0x7FC00000);  // NaN
      key_norm[r] = inside ? key_norm[r] : 0.0f;
      value_norm[r] = inside && exists ? value_norm[r] : 0.0f;
    }
    float largest = maximum(value_norm[0], value_norm[1]);
    bool grows = largest > s.top;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][c] *= factor[i][c % 2] * key_norm[c / 2];
    }
    if constexpr (kMapped) {
      mapped.turn(args, tile, acc);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = 8 * i + 2 * t + c % 2;
          acc[i][c] = acc[i][c] * mapped.turn_scale[column] + mapped.bias[column];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (a.soft_cap > 0.0f) {  // cap * tanh(score / cap)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float grown = exp2_fast(acc[i][c] * args.cap_in);
          acc[i][c] = args.cap_out * (1.0f - 2.0f * reciprocal_fast(1.0f + grown));
        }
      }
      if (!whole) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int token = token_of_row(r);
          bool unseen = token >= end || token < begin;
          unseen |=
              copy_row(a, only_here(b.req), end, token) >= 0;  // codes end where new tokens begin
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int row = positions[8 * i + 2 * only_here(t) + c];
            const bool hidden =
                unseen || token > row || token < first_seen(only_here(a.reach), row);
            if (hidden) acc[i][2 * r + c] = -bits_to_float(0x7F800000);  // -infinity
          }
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) grows |= acc[i][c] > s.m[i][c % 2] + kSlack;
    }

    // ---- rarely: new references for the weights and for the value norms
    if (any(grows)) {
      largest = maximum(warp_max(largest), s.top);
      const float shrink = s.top * reciprocal_fast(largest);
      s.top = largest;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float m = maximum(s.m[i][c], maximum(acc[i][c], acc[i][c + 2]));
          for (int mask = 4; mask < kWarp; mask *= 2) m = maximum(m, shuffle_xor(m, mask));
          const float rescale = exp2_fast(s.m[i][c] - m);
          s.m[i][c] = m;
          s.l[i][c] *= rescale;
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            s.o[i][j][c] *= rescale * shrink;
            s.o[i][j][c + 2] *= rescale * shrink;
          }
        }
      }
    }

    // ---- weights, times value norms, as mma B fragments
    const float unit = reciprocal_fast(s.top);
    uint32_t p[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float weight[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        weight[c] = exp2_fast(acc[i][c] - s.m[i][c % 2]);
        s.l[i][c % 2] += weight[c];
        weight[c] *= value_norm[c / 2] * unit;
      }
      p[i][0] = transpose(to_half2(weight[0], weight[1]));
      p[i][1] = transpose(to_half2(weight[2], weight[3]));
    }

    // ---- outputs
    with_kind<kValueKind>(args.value_kind,
                          OutputTile<kHeadDim, kTiles>{tables, records + value_bytes, args.bytes_1,
                                                       args.bytes_8, p, s.o});
  }
  // No copy is under way: those behind the last tile are of nothing.
  sync_cta();  // all warps have read the tables, where the scratch is
  store_state<kHeadDim, kTiles>(args, b, group, kv_head, split, s, reinterpret_cast<float*>(tables),
                                reinterpret_cast<float*>(rings));
}

}  // namespace fq
