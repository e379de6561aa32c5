// SPDX-License-Identifier: Apache-2.0
// Attention over the codes of one split: states (o, m, l) of every row, in the rotated basis.
//
// A CTA owns a row block (up to 8 * kTiles rows of one request and KV head; a row is one query head
// of one new token) and one split of the positions it sees. Its warps take tiles of 16 tokens in
// turn, each with a state of its own, and merge once at the end; no barrier in between.
//
// Per tile, both products are transposed, so that rows of the row block are the 8 columns of an
// mma:
//   S^T [16 tokens, 8 rows]  = K [16, d] Q^T [d, 8]       then times key norms
//   O^T [d, 8 rows]         += V^T [d, 16] P^T [16, 8]    P = weights times value norms
// The order in which a product sums over coordinates is free, so a lane's codewords are its operand
// registers as they are: lane 4 g + t takes coordinates t d/4 ... of keys of rows g and g + 8, and
// coordinates g d/8 ... of values of rows 2t, 2t + 1, 2t + 8, 2t + 9 (where a warp does not divide
// d see lanes.h). Which of a tile's tokens is in which row is token_order.h's choice.
//
// Shared memory: tables | query fragments | row constants | a ring of record tiles per warp. The
// tables' place is used again for the final merge.
//
// Invariants. A row that saw nothing has m = kEmpty and l = 0. Scores and m are base-2 logarithms.
// m may lag behind the largest score by kSlack, so weights reach 2^kSlack; value norms are divided
// by the largest so far: the float16 P stays below 2^kSlack. Norms outside [begin, end) are
// replaced by zeros before arithmetic: memory nobody wrote may hold NaN.
#pragma once

#include "cuda/codes.h"
#include "cuda/key_map.h"
#include "cuda/lanes.h"
#include "cuda/params.h"
#include "cuda/rotation.h"
#include "cuda/token_order.h"
#include "page_layout.h"

namespace fq {

constexpr int kStages = 3;
constexpr int kCtaReserve = 1 << 10;         // shared memory that CUDA takes for each CTA
constexpr float kLeastNorm = 5.9604645e-8f;  // the least float16 above 0
constexpr float kEmpty = -1e30f, kSlack = 6.0f, kLog2e = 1.4426950408889634f;

struct AttendArgs {
  FqCudaCodec codec;
  FqPages pages;
  FqCudaAttend call;
  RecordLayout layout;
  int32_t key_kind, value_kind;  // CodeKind
  // What the launcher knows and a register need not hold.
  int32_t tiles_per_block, step_blocks, step_tiles;  // num_warps tiles are so many blocks and tiles
  TokenOrder order;
  int32_t bytes_1, bytes_8;  // from the record of row 0 to those of rows 1 and 8
  float cap_in, cap_out;     // a score becomes cap_out * tanh(cap_in / 2 * score / log2(e))
  bool has_raw;       // the call's raw states are those of new tokens, not of first ones alone
  int32_t num_apart;  // first tokens that prepare.h attends
  // Read with a key map alone.
  FqCudaKeyMap map;
  Prepared prepared;
  Product product;
  bool is_product;  // keys are coded by `product`
};

// Which rows a CTA owns. Rows of a request and KV head are numbered token first, head of the group
// second; row blocks of request r begin at number floor(query_start_loc[r] * group / columns) + r,
// so a grid of floor(num_tokens * group / columns) + num_reqs holds every batch.
struct RowBlock {
  int req, first_row, num_rows;  // num_rows is 0 or less when the block is empty
  int first_token;               // row of the query tensor of the request's first new token
  int context;                   // tokens before the new ones

  FQ_DEVICE static RowBlock find(const FqCudaAttend& a, int group, int columns, int block) {
    int low = 0, high = a.num_reqs - 1;
    while (low < high) {  // the last request that begins at or before this block
      const int middle = (low + high + 1) / 2;
      const int begins = (int)((int64_t)a.query_start_loc[middle] * group / columns) + middle;
      if (begins <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    RowBlock b;
    b.req = low;
    b.first_token = a.query_start_loc[low];
    const int query_len = a.query_start_loc[low + 1] - b.first_token;
    const int begins = (int)((int64_t)b.first_token * group / columns) + low;
    b.context = a.seq_lens[low] - query_len;
    b.first_row = (block - begins) * columns;
    b.num_rows = query_len * group - b.first_row;
    if (b.num_rows > columns) b.num_rows = columns;
    if (b.first_row < 0) b.num_rows = 0;
    return b;
  }
};

// Bytes of shared memory that a CTA may ask for, and that a multiprocessor has.
struct SharedLimits {
  int per_cta, per_sm;
};

// How a launch fills a multiprocessor: CTAs side by side, warps and shared memory of each.
struct Occupancy {
  int ctas, warps, shared_bytes;
};

template <int kHeadDim, int kTiles, int kMapped = 0>
struct AttendShape {
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kSteps = kHeadDim / 16;  // k steps of S^T, m tiles of O^T
  static constexpr int kQueryBytes = kColumns * kHeadDim * 2;
  static constexpr int kRowBytes = kColumns * 8;  // factor and position of each row
  // Of a key map: cosines and sines as A fragments, rows' factors of them, columns, two constants.
  static constexpr int kTurnSteps = kMapped ? turn_steps(kHeadDim) : 0;
  static constexpr int kTurnBytes =
      kTurnSteps * (kWarp * 16 * (1 + kTiles) + 8 * 4) + kMapped * kColumns * 8;
  static constexpr int kFixedBytes = kTableBytes + kQueryBytes + kRowBytes + kTurnBytes;
  // By registers: 16 warps of at most 128 each, or 8.
  static constexpr int kMaxWarps = kTiles == 1 && kHeadDim <= 128 ? 16 : 8;
  static constexpr int kCtas = kMaxWarps / 8;
  static constexpr int shared_bytes(int record_bytes, int num_warps) {
    return kFixedBytes + num_warps * kStages * kTokens * record_bytes;
  }
  // The most warps at once; of equally many, in more CTAs: while one begins or ends, another works.
  static Occupancy occupancy(int record_bytes, SharedLimits limits) {
    Occupancy best = {1, 1, shared_bytes(record_bytes, 1)};
    for (int ctas = 1; ctas <= kCtas; ++ctas) {
      for (int warps = 1; warps <= kMaxWarps / ctas; ++warps) {
        const int bytes = shared_bytes(record_bytes, warps);
        if (bytes > limits.per_cta || ctas * (bytes + kCtaReserve) > limits.per_sm) break;
        if (ctas * warps >= best.ctas * best.warps) best = {ctas, warps, bytes};
      }
    }
    return best;
  }
  static_assert(kMaxWarps * 8 * kHeadDim * 4 <= kTableBytes, "the merge fits in the tables");
};

// The oldest position that a query at `position` sees; `reach` as in FqCudaAttend.
FQ_DEVICE int first_seen(int reach, int position) {
  if (reach < 0 && position > 0) return position - position % -reach;
  return reach > 0 && position >= reach ? position - reach + 1 : 0;
}

// Position of a row block's row in the state tensors.
FQ_DEVICE int64_t state_row(const FqCudaAttend& a, const RowBlock& b, int group, int kv_head,
                            int row) {
  const int token = b.first_token + (b.first_row + row) / group;
  return (int64_t)token * a.num_q_heads + kv_head * group + (b.first_row + row) % group;
}

// The row of the copy that stands in the place of a cached token's code, -1 for none.
FQ_DEVICE int copy_row(const FqCudaAttend& a, int req, int context, int token) {
  if (!a.copy_table) return -1;
  int column = token;
  if (token >= a.num_copied_first) {
    column = a.num_copy_columns - (context - token);
    if (column < a.num_copied_first) return -1;
  }
  if (token >= context || column >= a.num_copy_columns) return -1;
  const int row = a.copy_table[(int64_t)req * a.num_copy_columns + column];
  return row < a.num_copy_rows ? row : -1;
}

// Rotates the row block's queries into mma B fragments, float16, each divided by its largest
// coordinate, which goes into the row's factor. Rows that do not exist are zeros at position -1.
template <int kHeadDim, int kTiles>
FQ_DEVICE void load_queries(const AttendArgs& args, const RowBlock& b, int group, int kv_head,
                            uint8_t* fragments, float* factors, int32_t* positions,
                            float* scratch) {
  using Shape = AttendShape<kHeadDim, kTiles>;
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const FqCudaAttend& a = args.call;
  for (int row = warp_idx(); row < Shape::kColumns; row += num_threads() / kWarp) {
    float x[kPerLane];
    const bool exists = row < b.num_rows;
    const int token = (b.first_row + row) / group, head = (b.first_row + row) % group;
    const int64_t at = (b.first_token + token) * a.stride_query_token +
                       (kv_head * group + head) * a.stride_query_head;
    float peak = 0.0f;
    for (int i = 0; i < kPerLane; ++i) {
      const int coord = lane_idx() * kPerLane + i;
      const bool loads = exists && holds<kHeadDim>(coord);
      x[i] = loads ? load_element(a.query, at + coord, a.dtype) : 0.0f;
    }
    rotate<kHeadDim>(args.codec, x, scratch, false);
    for (int i = 0; i < kPerLane; ++i) peak = maximum(peak, absolute(x[i]));
    peak = warp_max(peak);
    const float inverse = peak >= kMinNormal ? 1.0f / peak : 0.0f;  // of less it is infinite
    for (int i = 0; i < kPerLane; ++i) {
      const int coord = lane_idx() * kPerLane + i;
      if (!holds<kHeadDim>(coord)) continue;
      const int part = coord / (kHeadDim / 4), within = coord % (kHeadDim / 4);
      const int step = within / 4, lane = row % 8 * 4 + part;
      // A NaN stays one: 0 * NaN.
      const uint16_t half = (uint16_t)to_half2(x[i] * inverse, 0.0f);
      uint8_t* to = fragments + (((row / 8) * Shape::kSteps + step) * kWarp + lane) * 8;
      reinterpret_cast<uint16_t*>(to)[within % 4] = half;
    }
    if (lane_idx() == 0) {
      factors[row] = peak * a.scale * args.codec.key.table_scale * kLog2e;
      positions[row] = exists ? b.context + token : -1;
    }
  }
}

// acc += K Q^T for the 16 tokens whose records are at `tile`; `own` is where the record of this
// lane's row g begins, `bytes_8` how far from there row g + 8's does.
template <int kKind, int kHeadDim, int kTiles>
FQ_DEVICE void score_tile(const uint8_t* tables, const uint8_t* own, int bytes_8,
                          const uint8_t* fragments, const Pair* held, float (&acc)[kTiles][4]) {
  constexpr int kSteps = kHeadDim / 16;
  using Keys = Lookup<kKind, kHeadDim / 4, false, kOddRecords<kHeadDim>>;
  constexpr int kTogether = Keys::kTogether;
  static_assert(Keys::kQuads == kSteps && kSteps % kTogether == 0);
  const Keys keys = Keys::make(tables, lane_idx() % 4);
  uint32_t low[Keys::kWords], high[Keys::kWords];
  keys.read(own, low);
  keys.read(own + bytes_8, high);
#pragma unroll
  for (int first = 0; first < kSteps; first += kTogether) {
    Pair a[kTogether], b[kTogether];
    keys.quads(low, first, a);
    keys.quads(high, first, b);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int step = first + j;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Pair q = kTiles == 1
                           ? held[step]
                           : load_pair(fragments + ((i * kSteps + step) * kWarp + lane_idx()) * 8);
        mma(acc[i], a[j].x, b[j].x, a[j].y, b[j].y, q.x, q.y);
      }
    }
  }
}

// o += V^T P^T for the 16 tokens of a tile; `own` is where the value field of this lane's row 2t
// begins, `bytes_1` and `bytes_8` how far from there those of rows 2t + 1 and 2t + 8 do.
template <int kKind, int kHeadDim, int kTiles>
FQ_DEVICE void output_tile(const uint8_t* tables, const uint8_t* own, int bytes_1, int bytes_8,
                           const uint32_t (&p)[kTiles][2], float (&o)[kTiles][kHeadDim / 16][4]) {
  constexpr int kWhole = kWholeCoords<kHeadDim>;
  using Values = Lookup<kKind, kWhole / 8, true, kOddRecords<kHeadDim>>;
  static_assert(Values::kQuads == kHeadDim / 32 && Values::kTogether == 1);
  const Values values = Values::make(tables, lane_idx() / 4);
  uint32_t words[4][Values::kWords];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    values.read(own + (i & 1) * bytes_1 + (i & 2) / 2 * bytes_8, words[i]);
#pragma unroll
  for (int u = 0; u < Values::kQuads; ++u) {
    Pair e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = values.quad(words[i], u);
    const uint32_t x0 = permute_bytes(e[0].x, e[1].x, 0x5410);
    const uint32_t x1 = permute_bytes(e[0].x, e[1].x, 0x7632);
    const uint32_t x2 = permute_bytes(e[2].x, e[3].x, 0x5410);
    const uint32_t x3 = permute_bytes(e[2].x, e[3].x, 0x7632);
    const uint32_t y0 = permute_bytes(e[0].y, e[1].y, 0x5410);
    const uint32_t y1 = permute_bytes(e[0].y, e[1].y, 0x7632);
    const uint32_t y2 = permute_bytes(e[2].y, e[3].y, 0x5410);
    const uint32_t y3 = permute_bytes(e[2].y, e[3].y, 0x7632);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mma(o[i][2 * u], x0, x1, x2, x3, p[i][0], p[i][1]);
      mma(o[i][2 * u + 1], y0, y1, y2, y3, p[i][0], p[i][1]);
    }
  }
  if constexpr (kHeadDim > kWhole) {  // one step more, of two coordinates a lane
    uint32_t e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* field = own + (i & 1) * bytes_1 + (i & 2) / 2 * bytes_8;
      e[i] = load_two<kKind>(values.side, field, kWhole + lane_idx() / 4 * 2);
    }
    const uint32_t z0 = permute_bytes(e[0], e[1], 0x5410);
    const uint32_t z1 = permute_bytes(e[0], e[1], 0x7632);
    const uint32_t z2 = permute_bytes(e[2], e[3], 0x5410);
    const uint32_t z3 = permute_bytes(e[2], e[3], 0x7632);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma(o[i][kWhole / 16], z0, z1, z2, z3, p[i][0], p[i][1]);
  }
}

// Calls function.run<kind>() for a kind known at run time only.
template <int kKind, class Function>
FQ_DEVICE void with_kind(int32_t kind, Function&& function) {
  if constexpr (kKind != kAnyKind) {
    function.template run<kKind>();
  } else {
    switch (kind) {
#define FQ_CASE(name, dim, bits, folded, text) \
  case name:                                   \
    function.template run<name>();             \
    break;
      FQ_CODES(FQ_CASE)
#undef FQ_CASE
      default:
        break;
    }
  }
}

template <int kHeadDim, int kTiles>
struct ScoreTile {
  const uint8_t *tables, *own;
  int bytes_8;
  const uint8_t* fragments;
  const Pair* held;
  float (&acc)[kTiles][4];
  template <int kKind>
  FQ_DEVICE void run() {
    score_tile<kKind, kHeadDim, kTiles>(tables, own, bytes_8, fragments, held, acc);
  }
};

template <int kHeadDim, int kTiles>
struct OutputTile {
  const uint8_t *tables, *own;
  int bytes_1, bytes_8;
  const uint32_t (&p)[kTiles][2];
  float (&o)[kTiles][kHeadDim / 16][4];
  template <int kKind>
  FQ_DEVICE void run() {
    output_tile<kKind, kHeadDim, kTiles>(tables, own, bytes_1, bytes_8, p, o);
  }
};

}  // namespace fq
