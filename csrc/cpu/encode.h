// SPDX-License-Identifier: Apache-2.0
// Encodes new tokens into their slots.
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
  for (int i = 0; i < b.count; ++i) {
    b.size[i] = to_direction(codec, b.x + (int64_t)i * head_dim);
    nonfinite += b.size[i].peak == __builtin_inff();
  }
  if (code.folded) fold(code, b.count * num_subvecs, b.x, b.patterns);
  nearest_all(code, b.count * num_subvecs, b.x, b.index);
  for (int i = 0; i < b.count; ++i) {
    norm[i] = pack_vector(codec, code, b.x + (int64_t)i * head_dim, b.size[i],
                          b.index + (int64_t)i * num_subvecs, b.patterns + (int64_t)i * num_subvecs,
                          b.record[i] + index_offset);
  }
  return nonfinite;
}

// Encodes a batch into its zeroed records. Returns the number of vectors with a NaN or infinity.
static int64_t encode_batch(const FqCodec& codec, const RecordLayout& layout, const FqEncode& args,
                            Batch& b) {
  const int head_dim = codec.head_dim;
  const FqKeyMap* map = args.key_map;
  int64_t nonfinite = 0;
  for (int i = 0; i < b.count; ++i) {
    float* x = b.x + (int64_t)i * head_dim;
    load_row(args.key, b.token[i] * args.stride_key_token + b.head[i] * args.stride_key_head,
             args.dtype, head_dim, x);
    if (!map) continue;
    subtract_mean(*map, b.head[i], head_dim, map->turn_fine ? args.positions[b.token[i]] : 0, x);
  }
  if (map && map->num_coded > 0) {
    nonfinite += encode_transformed(*map, head_dim, layout.key_index_offset, b);
  } else {
    nonfinite += encode_vectors(codec, codec.key, b, layout.key_index_offset, b.norm[0]);
  }
  for (int i = 0; i < b.count; ++i) {
    load_row(args.value, b.token[i] * args.stride_value_token + b.head[i] * args.stride_value_head,
             args.dtype, head_dim, b.x + (int64_t)i * head_dim);
  }
  nonfinite += encode_vectors(codec, codec.value, b, layout.value_index_offset, b.norm[1]);
  for (int i = 0; i < b.count; ++i) {
    store_norm(codec, codec.key, b.norm[0][i], b.record[i] + layout.key_norm_offset);
    store_norm(codec, codec.value, b.norm[1][i], b.record[i] + layout.value_norm_offset);
  }
  return nonfinite;
}

// Encodes new tokens into their slots. Returns the number of vectors with a NaN or infinity, or -1
// when a slot lies outside the cache (that token is not written), or -2 when a position lies
// outside the table of the map of keys (nothing is written).
static int64_t encode_kv(const FqCodec& codec, const FqPages& pages, const FqEncode& args) {
  const RecordLayout layout = layout_of(codec.head_dim, codec.key, codec.value);
  const int64_t num_slots = pages.num_blocks * pages.block_size;
  const bool turns = args.key_map && args.key_map->turn_fine;
  for (int64_t token = 0; turns && token < args.num_tokens; ++token) {
    const int64_t position = args.positions[token];
    if (position < 0 || position >= args.key_map->num_positions) return -2;
  }
  const int64_t num_vectors = args.num_tokens * pages.num_kv_heads;
  if (num_vectors == 0) return 0;
  const bool has_lists = codec.key.num_cells > 0 || codec.value.num_cells > 0;
  const int fit = (has_lists ? kMaxListedFloats : kMaxFloats) / codec.head_dim;
  const int64_t share = (num_vectors + args.num_threads - 1) / args.num_threads;
  int most = fit < kMaxBatch ? fit : kMaxBatch;
  if (share < most) most = (int)share;
  int64_t nonfinite = 0, outside = 0;
#pragma omp parallel num_threads(args.num_threads) \
    reduction(+ : nonfinite, outside) if (num_vectors * codec.head_dim >= kMinCoordinates)
  {
    Batch batch;
    set_scratch(batch, codec.head_dim, most);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < num_vectors; first += most) {
      batch.count = 0;
      // Head by head: a batch then shares a matrix.
      for (int64_t i = first; i < first + most && i < num_vectors; ++i) {
        const int64_t token = i % args.num_tokens, head = i / args.num_tokens;
        const int64_t slot = args.slot_mapping[token];
        if (slot < 0) continue;
        if (slot >= num_slots) {
          ++outside;
          continue;
        }
        uint8_t* record = pages.base + slot / pages.block_size * pages.stride_block +
                          head * pages.stride_head +
                          slot % pages.block_size * (int64_t)layout.record_bytes;
        memset(record, 0, (size_t)layout.record_bytes);
        batch.token[batch.count] = token;
        batch.head[batch.count] = (int)head;
        batch.record[batch.count++] = record;
      }
      nonfinite += encode_batch(codec, layout, args, batch);
    }
  }
  return outside ? -1 : nonfinite;
}

}  // namespace fq::FQ_ISA
