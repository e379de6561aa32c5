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

// Heads [head, head + rows) of a request, which share its decoded tiles.
struct LatentBlock {
  int32_t req, head, rows;
  int32_t num_splits;
  float* partial;  // the stored states of its splits, null when one job does all
};

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

static void load_latent_queries(const LatentCall& call, const LatentBlock& b,
                                const LatentScratch& s) {
  const FqAttendLatents& a = call.args;
  const int head_dim = call.codec.head_dim;
  for (int r = 0; r < b.rows; ++r) {
    const int64_t at = b.req * a.stride_query_req + (b.head + r) * a.stride_query_head;
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

// Attends a row block's split into `state`, which it clears first.
static void attend_latent_split(LatentCall& call, const LatentBlock& b, int split,
                                const LatentScratch& s, const State& state) {
  const FqAttendLatents& a = call.args;
  const int head_dim = call.codec.head_dim, rotary_dim = a.rotary_dim;
  const int tile = tile_tokens(head_dim), req = b.req, rows = b.rows, length = a.seq_lens[req];
  const int begin = split * kSplit, end = begin + kSplit < length ? begin + kSplit : length;
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

// Un-rotates s.total and writes the row block's output.
static void finish_latent(const LatentCall& call, const LatentBlock& b, const LatentScratch& s) {
  const int head_dim = call.codec.head_dim;
  for (int r = 0; r < b.rows; ++r) {
    float* o = s.total.o + (int64_t)r * head_dim;
    rotate(call.codec, o, true);
    const vf scale = splat(s.total.l[r] == 0.0f ? 0.0f : 1.0f / s.total.l[r]);
    for (int i = 0; i < head_dim; i += kLanes) store(o + i, load(o + i) * scale);
    const int64_t at = ((int64_t)b.req * call.args.num_heads + b.head + r) * head_dim;
    store_row(call.args.out, at, call.args.dtype, head_dim, o);
  }
}

static inline State latent_partial(const LatentCall& call, const LatentBlock& b, int split) {
  const int head_dim = call.codec.head_dim;
  float* at = b.partial + split * padded(state_floats(b.rows, head_dim));
  return state_at(at, b.rows, head_dim);
}

static void run_latent_job(LatentCall& call, const LatentBlock& b, const Job& job,
                           const LatentScratch& s) {
  const int head_dim = call.codec.head_dim;
  load_latent_queries(call, b, s);
  if (!b.partial) clear(s.total, b.rows, head_dim);
  for (int i = job.split_begin; i < job.split_end; ++i) {
    attend_latent_split(call, b, i, s, b.partial ? latent_partial(call, b, i) : s.split);
    if (!b.partial) merge(s.total, s.split, b.rows, head_dim);
  }
  if (!b.partial) finish_latent(call, b, s);
}

static void merge_latent_partials(const LatentCall& call, const LatentBlock& b,
                                  const LatentScratch& s) {
  const int head_dim = call.codec.head_dim;
  clear(s.total, b.rows, head_dim);
  for (int i = 0; i < b.num_splits; ++i) {
    merge(s.total, latent_partial(call, b, i), b.rows, head_dim);
  }
  finish_latent(call, b, s);
}

// Attends one new token of each request. Returns 0, or as paged_attention: 1, or 3 for a length
// below 0 or beyond the block table.
static int attend_latents(const FqCodec& codec, const FqPages& pages, const FqAttendLatents& args) {
  const int head_dim = codec.head_dim;
  const int most_rows = args.num_heads < kMaxRows ? args.num_heads : kMaxRows;
  const int blocks_per_req = (args.num_heads + most_rows - 1) / most_rows;
  const int64_t num_blocks = (int64_t)args.num_reqs * blocks_per_req;
  int64_t num_splits = 0, work = 0;
  for (int req = 0; req < args.num_reqs; ++req) {
    const int length = args.seq_lens[req];
    if (length < 0 || length > args.stride_block_table * pages.block_size) return 3;
    num_splits += (int64_t)blocks_per_req * ((length + kSplit - 1) / kSplit);
    work += (int64_t)length * args.num_heads;
  }
  // A job is a whole row block; a split where there are too few of those for the threads.
  const bool shares = args.num_threads > 1 && num_blocks < 4 * (int64_t)args.num_threads;
  const int64_t num_jobs = shares ? num_splits : num_blocks;
  const int64_t floats = padded(state_floats(most_rows, head_dim));
  const int64_t stored = shares ? num_splits * floats : 0;
  float* partial = static_cast<float*>(call_scratch((size_t)stored * sizeof(float) +
                                                    (size_t)num_blocks * sizeof(LatentBlock) +
                                                    (size_t)num_jobs * sizeof(Job)));
  LatentBlock* blocks = reinterpret_cast<LatentBlock*>(partial + stored);
  Job* jobs = reinterpret_cast<Job*>(blocks + num_blocks);
  Job* job = jobs;
  for (int i = 0; i < (int)num_blocks; ++i) {
    LatentBlock& b = blocks[i];
    b.req = i / blocks_per_req;
    b.head = i % blocks_per_req * most_rows;
    b.rows = args.num_heads - b.head < most_rows ? args.num_heads - b.head : most_rows;
    b.num_splits = (args.seq_lens[b.req] + kSplit - 1) / kSplit;
    b.partial = shares ? partial : nullptr;
    if (!shares) *job++ = {i, 0, b.num_splits};
    for (int split = 0; shares && split < b.num_splits; ++split, partial += floats) {
      *job++ = {i, split, split + 1};
    }
  }
  LatentCall call = {
      codec, pages, args, latent_layout(codec, args.rotary_dim), code_kernels(codec.value), false};
#pragma omp parallel num_threads(args.num_threads) if (work >= kMinParallelWork)
  {
    const LatentScratch s = latent_scratch(most_rows, head_dim, args.rotary_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_jobs; ++i) run_latent_job(call, blocks[jobs[i].block], jobs[i], s);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < (shares ? num_blocks : 0); ++i) {
      merge_latent_partials(call, blocks[i], s);
    }
  }
  return call.bad_block ? 1 : 0;
}

}  // namespace fq::FQ_ISA
