// SPDX-License-Identifier: Apache-2.0
// Records of latents, and attention over them: a latent is key and value of all heads, and a rotary
// key in bfloat16 stands beside it (vllm_fibquant/codec/latent.py).
//
// A tile of latents is decoded once, for scores and for the weighted sum. As in attention.h, splits
// are kSplit tokens at fixed positions and are merged in order of position: a row's bits depend on
// its own query and tokens alone.
#pragma once

#include "cpu/encode_batch.h"
#include "cpu/latent_params.h"
#include "cpu/plan.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"

namespace fq::FQ_ISA {

// Where norm and rotary key of a record are; indices come first.
struct LatentLayout {
  int norm, rotary, record_bytes;
};

static inline LatentLayout latent_layout(const FqCodec& codec, int rotary_dim) {
  const FqCode& code = codec.value;
  const int norm = (index_bytes(codec.head_dim / code.subvec_dim, code.index_bits) + 1) & ~1;
  return {norm, norm + kNormBytes, norm + kNormBytes + 2 * rotary_dim};
}

// ---- encode -------------------------------------------------------------------------------------

// Stores a token's rotary key; one with a NaN or infinity as zeros. Returns whether it was one.
static bool store_rotary(const FqEncodeLatents& args, int64_t token, uint8_t* to) {
  alignas(64) float x[kMaxHeadDim];
  load_row(args.rotary, token * args.stride_rotary, args.dtype, args.rotary_dim, x);
  const bool is_bad = peak(x, args.rotary_dim) == __builtin_inff();
  for (int i = 0; i < args.rotary_dim; ++i) {
    const uint16_t half = is_bad ? 0 : float_to_bfloat(x[i]);
    memcpy(to + 2 * i, &half, 2);
  }
  return is_bad;
}

// Encodes tokens into their slots. Returns as encode_kv.
static int64_t encode_latents(const FqCodec& codec, const FqPages& pages,
                              const FqEncodeLatents& args) {
  const LatentLayout layout = latent_layout(codec, args.rotary_dim);
  const int64_t num_slots = pages.num_blocks * pages.block_size;
  const int head_dim = codec.head_dim, most = kMaxFloats / head_dim;
  int64_t nonfinite = 0, outside = 0;
#pragma omp parallel num_threads(args.num_threads) \
    reduction(+ : nonfinite, outside) if (args.num_tokens * head_dim >= kMinCoordinates)
  {
    Batch b;
    set_scratch(b, head_dim, most);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < args.num_tokens; begin += most) {
      b.count = 0;
      for (int64_t i = begin; i < begin + most && i < args.num_tokens; ++i) {
        const int64_t slot = args.slot_mapping[i];
        outside += slot >= num_slots;
        if (slot < 0 || slot >= num_slots) continue;
        uint8_t* record = pages.base + slot / pages.block_size * pages.stride_block +
                          slot % pages.block_size * (int64_t)layout.record_bytes;
        memset(record, 0, (size_t)layout.norm);
        nonfinite += store_rotary(args, i, record + layout.rotary);
        load_row(args.latent, i * args.stride_latent, args.dtype, head_dim,
                 b.x + (int64_t)b.count * head_dim);
        b.record[b.count++] = record;
      }
      nonfinite += encode_vectors(codec, codec.value, b, 0, b.norm[0]);
      for (int i = 0; i < b.count; ++i) store_norm(b.norm[0][i], b.record[i] + layout.norm);
    }
  }
  return outside ? -1 : nonfinite;
}

// ---- attention ----------------------------------------------------------------------------------

struct LatentCall {
  const FqCodec& codec;
  const FqPages& pages;
  const FqAttendLatents& args;
  LatentLayout layout;
  CodeKernels code;
  bool bad_block;  // as Call::bad_block
};

struct LatentScratch {
  float *query, *rotary_query;  // [rows, head_dim], rotated, and [rows, rotary_dim], times scale
  float *tile, *rotary_tile;    // [kMaxTile, head_dim] and [kMaxTile, rotary_dim]
  float *scores, *rotary_scores, *key_factor, *value_factor, *alpha;
  State split, total;
};

static LatentScratch latent_scratch(int rows, int head_dim, int rotary_dim) {
  LatentScratch s;
  int64_t total = 0;
  for (float* base = nullptr;; base = static_cast<float*>(thread_scratch((size_t)total * 4))) {
    const bool counts = !base;
    total = 0;
    const auto take = [&](int64_t floats) {
      float* p = base ? base + total : nullptr;
      total += padded(floats);
      return p;
    };
    s.query = take((int64_t)rows * head_dim);
    s.rotary_query = take((int64_t)rows * rotary_dim);
    s.tile = take((int64_t)kMaxTile * head_dim);
    s.rotary_tile = take((int64_t)kMaxTile * rotary_dim);
    s.scores = take((int64_t)rows * kMaxTile);
    s.rotary_scores = take((int64_t)rows * kMaxTile);
    s.key_factor = take(kMaxTile);
    s.value_factor = take(kMaxTile);
    s.alpha = take(rows);
    s.split = state_at(take(state_floats(rows, head_dim)), rows, head_dim);
    s.total = state_at(take(state_floats(rows, head_dim)), rows, head_dim);
    if (!counts) return s;
  }
}

// The queries of heads [head, head + rows) of a request.
static void load_latent_queries(const LatentCall& call, int req, int head, int rows,
                                const LatentScratch& s) {
  const FqAttendLatents& a = call.args;
  const int head_dim = call.codec.head_dim;
  for (int r = 0; r < rows; ++r) {
    const int64_t at = req * a.stride_query_req + (head + r) * a.stride_query_head;
    float* q = s.query + (int64_t)r * head_dim;
    load_row(a.query, at, a.dtype, head_dim, q);
    rotate(call.codec, q, false);
    float* p = s.rotary_query + (int64_t)r * a.rotary_dim;
    load_row(a.query, at + head_dim, a.dtype, a.rotary_dim, p);
    for (int i = 0; i < a.rotary_dim; i += kLanes) store(p + i, load(p + i) * splat(a.scale));
  }
}

// The record of a request's token at `position`, or null for a bad block.
static inline const uint8_t* latent_record(LatentCall& call, int req, int position) {
  const int block_size = call.pages.block_size;
  const int64_t block =
      call.args.block_table[req * call.args.stride_block_table + position / block_size];
  if (block < 0 || block >= call.pages.num_blocks) {
    __atomic_store_n(&call.bad_block, true, __ATOMIC_RELAXED);
    return nullptr;
  }
  return call.pages.base + block * call.pages.stride_block +
         position % block_size * (int64_t)call.layout.record_bytes;
}

// Attends positions [begin, end) of one split into `state`, which it clears first.
static void attend_latent_split(LatentCall& call, int req, int rows, int begin, int end,
                                const LatentScratch& s, const State& state) {
  const FqAttendLatents& a = call.args;
  const int head_dim = call.codec.head_dim, rotary_dim = a.rotary_dim;
  const int tile = tile_tokens(head_dim), length = a.seq_lens[req];
  clear(state, rows, head_dim);
  for (int t0 = begin; t0 < end; t0 += tile) {
    const int count = end - t0 < tile ? end - t0 : tile, rounded = (count + 7) & ~7;
    const uint8_t* fields[kMaxTile];
    for (int j = 0; j < tile; ++j) {
      // Tokens behind the last one borrow the first one's record: the mask hides them.
      fields[j] = j < count ? latent_record(call, req, t0 + j) : fields[0];
      if (!fields[j]) return;
      const float norm = j < count ? load_norm(fields[j] + call.layout.norm) : 0.0f;
      s.key_factor[j] = norm * a.scale;
      s.value_factor[j] = norm;
      if (j >= rounded) continue;
      load_row(fields[j] + call.layout.rotary, 0, kFqBFloat16, rotary_dim,
               s.rotary_tile + (int64_t)j * rotary_dim);
    }
    for (int j = 0; j < tile && t0 + tile + j < end; ++j) {
      const uint8_t* next = latent_record(call, req, t0 + tile + j);
      for (int i = 0; next && i < call.layout.record_bytes; i += 64) __builtin_prefetch(next + i);
    }
    call.code.decode(call.codec.value, head_dim, fields, rounded, s.tile);
    const DenseTile latents = {s.tile, head_dim}, rotary = {s.rotary_tile, rotary_dim};
    dot_tile(s.query, rows, latents, head_dim, rounded, s.scores);
    dot_tile(s.rotary_query, rows, rotary, rotary_dim, rounded, s.rotary_scores);
    const Mask mask = {t0, count, length - 1, rows, 0, 0, nullptr, nullptr, s.rotary_scores};
    softmax_tile(s.scores, rows, s.key_factor, s.value_factor, mask, 0.0f, state, s.alpha);
    axpy_tile(s.scores, s.alpha, rows, latents, head_dim, count, state.o);
  }
}

// Writes what heads [head, head + rows) of a request have found.
static void finish_latent(const LatentCall& call, int req, int head, int rows, const State& state) {
  const int head_dim = call.codec.head_dim;
  for (int r = 0; r < rows; ++r) {
    float* o = state.o + (int64_t)r * head_dim;
    rotate(call.codec, o, true);
    const vf scale = splat(state.l[r] == 0.0f ? 0.0f : 1.0f / state.l[r]);
    for (int i = 0; i < head_dim; i += kLanes) store(o + i, load(o + i) * scale);
    const int64_t at = ((int64_t)req * call.args.num_heads + head + r) * head_dim;
    store_row(call.args.out, at, call.args.dtype, head_dim, o);
  }
}

// Attends one new token of each request. Returns 0, or as paged_attention: 1, or 3 for a request
// longer than the block table.
static int attend_latents(const FqCodec& codec, const FqPages& pages, const FqAttendLatents& args) {
  const int head_dim = codec.head_dim;
  int most_splits = 1;
  int64_t work = 0;
  for (int req = 0; req < args.num_reqs; ++req) {
    const int length = args.seq_lens[req];
    if (length > args.stride_block_table * pages.block_size) return 3;
    const int num_splits = (length + kSplit - 1) / kSplit;
    most_splits = num_splits > most_splits ? num_splits : most_splits;
    work += (int64_t)length * args.num_heads;
  }
  const int most_rows = args.num_heads < kMaxRows ? args.num_heads : kMaxRows;
  const int num_blocks = (args.num_heads + most_rows - 1) / most_rows;
  const int64_t num_items = (int64_t)args.num_reqs * num_blocks;
  // Threads share a row block's splits only where there are few row blocks.
  const bool shares = args.num_threads > 1 && num_items < 4 * (int64_t)args.num_threads;
  const int parts = shares ? most_splits : 1;
  const int64_t state = padded(state_floats(most_rows, head_dim));
  // Of each row block, the number of its first split's stored state.
  int64_t num_states = 0;
  for (int req = 0; shares && req < args.num_reqs; ++req) {
    num_states += (int64_t)num_blocks * ((args.seq_lens[req] + kSplit - 1) / kSplit);
  }
  const size_t state_bytes = (size_t)(num_states * state) * 4;
  char* shared = static_cast<char*>(call_scratch(state_bytes + (size_t)num_items * 8));
  float* partials = reinterpret_cast<float*>(shared);
  int64_t* first_state = reinterpret_cast<int64_t*>(shared + state_bytes);
  for (int64_t item = 0, at = 0; shares && item < num_items; ++item) {
    first_state[item] = at;
    at += (args.seq_lens[item / num_blocks] + kSplit - 1) / kSplit;
  }
  LatentCall call = {
      codec, pages, args, latent_layout(codec, args.rotary_dim), code_kernels(codec.value), false};
  const auto rows_of = [&](int64_t item) {
    const int head = (int)(item % num_blocks) * most_rows;
    return args.num_heads - head < most_rows ? args.num_heads - head : most_rows;
  };
#pragma omp parallel num_threads(args.num_threads) if (work >= kMinParallelWork)
  {
    const LatentScratch s = latent_scratch(most_rows, head_dim, args.rotary_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < num_items * parts; ++job) {
      const int64_t item = job / parts;
      const int req = (int)(item / num_blocks), head = (int)(item % num_blocks) * most_rows;
      const int rows = rows_of(item), length = args.seq_lens[req];
      const int first = (int)(job % parts), last = shares ? first + 1 : most_splits;
      if (first * kSplit >= length && shares) continue;
      load_latent_queries(call, req, head, rows, s);
      if (!shares) clear(s.total, rows, head_dim);
      for (int i = first; i < last && i * kSplit < length; ++i) {
        const int end = (i + 1) * kSplit < length ? (i + 1) * kSplit : length;
        const State into =
            shares ? state_at(partials + (first_state[item] + i) * state, rows, head_dim) : s.split;
        attend_latent_split(call, req, rows, i * kSplit, end, s, into);
        if (!shares) merge(s.total, s.split, rows, head_dim);
      }
      if (!shares) finish_latent(call, req, head, rows, s.total);
    }
    if (shares) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < num_items; ++item) {
        const int req = (int)(item / num_blocks), rows = rows_of(item);
        clear(s.total, rows, head_dim);
        for (int i = 0; i * kSplit < args.seq_lens[req]; ++i) {
          merge(s.total, state_at(partials + (first_state[item] + i) * state, rows, head_dim), rows,
                head_dim);
        }
        finish_latent(call, req, (int)(item % num_blocks) * most_rows, rows, s.total);
      }
    }
  }
  return call.bad_block ? 1 : 0;
}

}  // namespace fq::FQ_ISA
