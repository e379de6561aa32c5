// SPDX-License-Identifier: Apache-2.0
// Codes and maps of keys in the C ABI of the CPU library: plain structs with tables, which
// vllm_fibquant/ops/cpu_tables.py fills.
#pragma once

#include <cstdint>

#include "abi.h"
#include "page_layout.h"

extern "C" {

// One vector code, of keys or of values.
struct FqCode {
  int32_t subvec_dim;
  int32_t index_bits;
  int32_t num_rows;         // codewords, or magnitudes of a sign-folded codebook
  int32_t folded;           // 0 or 1
  int32_t gain;             // FqGain
  int32_t num_rows_padded;  // num_rows rounded up to a multiple of 16
  const float* rows;        // [num_rows, subvec_dim], 64-byte aligned
  const float* rows_t;      // [subvec_dim, num_rows_padded], 64-byte aligned, zero padded
  const float* half_sq;     // [num_rows_padded], |row|^2 / 2, padded with +inf
  // Coarse-to-fine search (search.h): a tile is 16 rows, [subvec_dim + 1, 16] floats, its first
  // row -|c|^2 / 2, padded with -inf. All null and 0 for an exhaustive search.
  int32_t num_cells;          // at most 256
  int32_t num_lists;          // cells searched, 1 to num_cells
  const float* cell_tiles;    // [ceil(num_cells / 16)] tiles, 64-byte aligned
  const float* list_tiles;    // [list_begin[num_cells]] tiles, 64-byte aligned
  const int32_t* list_begin;  // [num_cells + 1], first tile of each cell's list
  const int32_t* list_index;  // [list_begin[num_cells], 16], row numbers, ascending in a list
  // The rows as integers, for dot products of bytes (byte_codes.h): [subvec_dim, 256] int8, or
  // [2, subvec_dim, 256], high and then low bytes, 64-byte aligned; null without. With H and L a
  // coordinate's bytes it is plane_step * H or plane_step * (H + L / 256); in a folded code
  // H + 1/2 and L + 1/2 stand in their place, so that a negated coordinate has inverted bytes.
  const uint8_t* planes;
  float plane_step;
  // Tables of search_tables.py, for byte_search.h. Null without.
  float scan_scale;   // 1 / step
  int32_t scan_most;  // largest |y / step|
  int32_t scan_margin;
  const int32_t* scan;           // [256, 1 + subvec_dim / 2]
  const uint8_t* squares;        // [64 * 64, 4]
  const uint8_t* square_planes;  // [8, 256], 64-byte aligned
  float square_low;
  float square_scale;        // 1 / size
  const uint8_t* boxes;      // [8 * 8 * 8 * 8, 16]
  const uint8_t* box_sides;  // [128]
  float box_low, box_fine;   // fine: 128 / the sides' length
  float box_scale;           // 1 / step
  float box_shift;
  float box_reach;  // of a coordinate
  int32_t box_margin;
};

// Both codes and the rotation they share.
struct FqCodec {
  int32_t head_dim;                // a multiple of 16, at most 512
  int32_t record_bytes;            // must equal record_layout(...).record_bytes
  const float* rotation_signs;     // [head_dim] of +-1 for a Hadamard rotation, else null
  const float* rotation_matrix;    // [head_dim, head_dim] row-major, y = M x; null for Hadamard
  const float* rotation_matrix_t;  // its transpose; null for Hadamard
  FqCode key;
  FqCode value;
};

// What one layer's keys are coded as: a key k of KV head h as k - mean[h] or, with a transform, as
// key_matrix[h] (k - mean[h]); but a request's first num_plain tokens as they are, or without
// first_key[h][p] and first_value[h][p] at positions p below num_first_means.
//
// With turn_fine, what is subtracted at position p is mean[h] + R_p c[h], R_p the rotary
// embedding, c[h] given in num_turning pairs of coordinates.
// R_p is R_q R_u for p = q + u: turn_coarse has the middles q of steps of 32 positions, 15.5 and so
// on, and turn_fine the u from 0.5 to 15.5. The pairs behind the first num_fast turn in steps: as
// in the 16th position of each, which turn_coarse has for them. The tables' columns are pairs that
// turn alike: fast ones first; both kinds are padded to a multiple of 16 columns.
//
// A transformed key z has num_coded coordinates. They are coded run by run, subvectors of 2, of 4
// and of 8 coordinates in turn; every index is one byte. The coordinates behind the last run are 0.
struct FqKeyMap {
  const float* mean;  // [num_kv_heads, head_dim]
  int64_t num_plain;
  const float* key_matrix_t;  // [num_kv_heads, head_dim, num_coded] or null
  // key_matrix_t as bfloat16 numbers, [num_kv_heads, head_dim / 2, num_coded], the even row's in
  // the low half of a word; null where they are not exactly these.
  const uint32_t* key_halves_t;
  const float* query_matrix_t;  // as key_matrix_t: a query q is scored as query_matrix[h] q
  const float* weight;          // [num_kv_heads, num_coded], of each coordinate's error
  float source_scale;           // length of z / |z| * source_scale is what the codebooks expect
  int32_t num_coded;            // a multiple of 16, at most head_dim
  int32_t num_subvecs[3];       // of 2, 4 and 8 coordinates
  FqCode codes[3];              // theirs: 256 rows each, searched exhaustively
  // [num_kv_heads, num_turning, 3]: a pair's two coordinates, and its column.
  const int32_t* turn_pairs;
  const float* turn_mean;       // [num_kv_heads, num_turning, 2], c in these coordinates
  const float* turn_fine;       // [2, num_fast_columns, 16], cosines and then sines, or null
  const float* turn_coarse;     // [num_positions / 32 + 1, 2, num_columns], likewise
  const int32_t* turn_columns;  // [head_dim], each coordinate's column
  // [num_kv_heads, 2, head_dim], R_p c of all coordinates as a factor of the coordinate's cosine
  // less one of its sine; 0 where nothing turns.
  const float* turn_dense;
  int64_t num_positions;
  int32_t num_turning;  // at most head_dim / 2
  int32_t num_fast;
  int32_t num_columns;  // at most head_dim / 2 + 32
  int32_t num_fast_columns;
  int32_t num_first_means;   // at most 16 and num_plain
  const float* first_key;    // [num_kv_heads, num_first_means, head_dim] or null
  const float* first_value;  // as first_key
};

}  // extern "C"

namespace fq {

static inline RecordLayout layout_of(int32_t head_dim, const FqCode& key, const FqCode& value) {
  return record_layout(index_bytes(head_dim / key.subvec_dim, key.index_bits),
                       index_bytes(head_dim / value.subvec_dim, value.index_bits));
}

}  // namespace fq
