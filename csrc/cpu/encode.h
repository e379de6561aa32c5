// SPDX-License-Identifier: Apache-2.0
// Encodes new tokens into their slots.
#pragma once

#include "cpu/encode_batch.h"
#include "page_layout.h"

namespace fq::FQ_ISA {

// Fills a batch with those of the vectors [begin, end) that are of first tokens, or with the
// others, and zeroes their records. Returns how many have a slot outside the cache, which are left
// out.
static int64_t fill_batch(const FqPages& pages, const RecordLayout& layout, const FqEncode& args,
                          int64_t begin, int64_t end, bool first, Batch& b) {
  const int64_t num_slots = pages.num_blocks * pages.block_size;
  int64_t outside = 0;
  b.count = 0;
  // Head by head: a batch then shares a matrix.
  int64_t token = begin % args.num_tokens, head = begin / args.num_tokens;
  int64_t of_slot = -1, offset = 0;  // divisions take longest here
  for (int64_t i = begin; i < end; ++i, ++token) {
    if (token == args.num_tokens) token = 0, ++head;
    const int64_t slot = args.slot_mapping[token];
    if (slot < 0 || is_first(args, token) != first) continue;
    if (slot >= num_slots) {
      ++outside;
      continue;
    }
    if (slot != of_slot) {
      of_slot = slot;
      offset = slot / pages.block_size * pages.stride_block +
               slot % pages.block_size * (int64_t)layout.record_bytes;
    }
    uint8_t* record = pages.base + offset + head * pages.stride_head;
    memset(record, 0, (size_t)layout.record_bytes);
    b.token[b.count] = token;
    b.head[b.count] = (int)head;
    b.record[b.count++] = record;
  }
  return outside;
}

// Encodes new tokens into their slots. Returns the number of vectors with a NaN or infinity, or -1
// when a slot lies outside the cache (that token is not written), or -2 when a position is
// negative or outside the table of the map of keys (nothing is written).
static int64_t encode_kv(const FqCodec& codec, const FqPages& pages, const FqEncode& args) {
  const RecordLayout layout = layout_of(codec.head_dim, codec.key, codec.value);
  const bool turns = args.key_map && args.key_map->turn_fine;
  for (int64_t token = 0; args.key_map && token < args.num_tokens; ++token) {
    const int64_t position = args.positions[token];
    if (position < 0 || (turns && position >= args.key_map->num_positions)) return -2;
  }
  const int64_t num_vectors = args.num_tokens * pages.num_kv_heads;
  if (num_vectors == 0) return 0;
  const bool has_lists = codec.key.num_cells > 0 || codec.value.num_cells > 0;
  const int fit = (has_lists ? kMaxListedFloats : kMaxFloats) / codec.head_dim;
  const bool alone = num_vectors * codec.head_dim < kMinCoordinates;
  const int64_t num_threads = alone ? 1 : args.num_threads;
  const int64_t share = (num_vectors + num_threads - 1) / num_threads;
  int most = fit < kMaxBatch ? fit : kMaxBatch;
  if (share < most) most = (int)share;
  int64_t nonfinite = 0, outside = 0;
  const auto encode = [&](int64_t begin, Batch& b, int64_t* bad, int64_t* left_out) {
    const int64_t end = begin + most < num_vectors ? begin + most : num_vectors;
    for (int first = args.key_map ? 1 : 0; first >= 0; --first) {
      *left_out += fill_batch(pages, layout, args, begin, end, first, b);
      if (b.count > 0) *bad += encode_batch(codec, layout, args, first, b);
    }
  };
  if (alone) {  // OpenMP takes its time for one thread as well
    Batch batch;
    set_scratch(batch, codec.head_dim, most);
    for (int64_t begin = 0; begin < num_vectors; begin += most) {
      encode(begin, batch, &nonfinite, &outside);
    }
    return outside ? -1 : nonfinite;
  }
#pragma omp parallel num_threads(args.num_threads) reduction(+ : nonfinite, outside)
  {
    Batch batch;
    set_scratch(batch, codec.head_dim, most);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < num_vectors; begin += most) {
      encode(begin, batch, &nonfinite, &outside);
    }
  }
  return outside ? -1 : nonfinite;
}

}  // namespace fq::FQ_ISA
