// SPDX-License-Identifier: Apache-2.0
// Encodes a batch of keys and values into records.
#pragma once

#include "cpu/batch.h"
#include "cpu/encode_mapped.h"
#include "page_layout.h"

namespace fq::FQ_ISA {

// Threads are woken for no fewer coordinates: to start them takes as long as to encode these.
constexpr int64_t kMinCoordinates = 1 << 14;

// Encodes b.x. Returns the number of vectors with a NaN or infinity.
static int64_t encode_vectors(const FqCodec& codec, const FqCode& code, Batch& b, int index_offset,
                              uint16_t* norm) {
  const int head_dim = codec.head_dim, num_subvecs = head_dim / code.subvec_dim;
  int64_t nonfinite = 0;
  // Step by step, all vectors in each: what one of them waits for does not hold up the others.
  to_directions(codec, b.count, b.x, b.size, b.parts);
  if (code.folded) fold(code, b.count * num_subvecs, b.x, b.patterns);
  nearest_all(code, b.count * num_subvecs, b.x, b.index);
  copy_rows(code, b.index, b.count * num_subvecs, b.decoded);
  for (int i = 0; i < b.count; ++i) {
    nonfinite += b.size[i].peak == __builtin_inff();
    if (b.size[i].peak == 0.0f || b.size[i].peak == __builtin_inff()) continue;
    const int64_t at = (int64_t)i * num_subvecs;
    pack_indices(code, num_subvecs, b.index + at, b.patterns + at, b.record[i] + index_offset);
  }
  for (int i = 0; i < b.count; ++i) {
    const int64_t at = (int64_t)i * head_dim;
    dot_and_square(b.x + at, b.decoded + at, head_dim, b.parts + 32 * i);
  }
  for (int i = 0; i < b.count; ++i) norm[i] = norm_of(code, b.size[i], b.parts + 32 * i);
  return nonfinite;
}

// Encodes a batch, all of first tokens or none, into its zeroed records. Returns the number of
// vectors with a NaN or infinity.
static int64_t encode_batch(const FqCodec& codec, const RecordLayout& layout, const FqEncode& args,
                            bool first, Batch& b) {
  const int head_dim = codec.head_dim;
  const FqKeyMap* map = args.key_map;
  int64_t nonfinite = 0;
  Turned turned;
  for (int i = 0; i < b.count; ++i) {
    float* x = b.x + (int64_t)i * head_dim;
    load_row(args.key, b.token[i] * args.stride_key_token + b.head[i] * args.stride_key_head,
             args.dtype, head_dim, x);
    if (!map) continue;
    const int64_t position = args.positions[b.token[i]];
    if (first) {
      subtract_first(*map, map->first_key, b.head[i], head_dim, position, x);
    } else {
      subtract_mean(*map, b.head[i], head_dim, position, turned, x);
    }
  }
  if (map && !first && map->num_coded > 0) {
    nonfinite += encode_transformed(*map, head_dim, layout.key_index_offset, b);
  } else {
    nonfinite += encode_vectors(codec, codec.key, b, layout.key_index_offset, b.norm[0]);
  }
  for (int i = 0; i < b.count; ++i) {
    float* x = b.x + (int64_t)i * head_dim;
    load_row(args.value, b.token[i] * args.stride_value_token + b.head[i] * args.stride_value_head,
             args.dtype, head_dim, x);
    if (!first) continue;
    subtract_first(*map, map->first_value, b.head[i], head_dim, args.positions[b.token[i]], x);
  }
  nonfinite += encode_vectors(codec, codec.value, b, layout.value_index_offset, b.norm[1]);
  for (int i = 0; i < b.count; ++i) {
    store_norm(b.norm[0][i], b.record[i] + layout.key_norm_offset);
    store_norm(b.norm[1][i], b.record[i] + layout.value_norm_offset);
  }
  return nonfinite;
}

}  // namespace fq::FQ_ISA
