// SPDX-License-Identifier: Apache-2.0
// Paged attention over codes.
//
// One job owns a row block (consecutive new tokens of one request times the query heads of one KV
// head) and a range of splits. A split is kSplit tokens at fixed positions; it is walked tile by
// tile: scores from the codes of keys, softmax, weighted sum of the codes of values.
// The first positions may be a leading split: FqAttend::keep_first of them with other queries and
// no window, or FqKeyMap::num_plain whose keys were coded as they are, the others being
// transformed. Codes of transformed keys are attended in the transform's basis, with transformed
// queries. Splits are merged in order of position, by the job itself or, when several jobs share a
// row block, from their stored states in a second pass: the same arithmetic either way.
//
// Codes are attended in the rotated basis: a job rotates its queries once and un-rotates its output
// once. Raw new tokens (FqAttend::raw_key) and copies of cached ones (copy_key) form a state of
// their own in the model's basis; the two are merged at the end.
#pragma once

#include "cpu/byte_attention.h"
#include "cpu/dense.h"
#include "cpu/first_tokens.h"
#include "cpu/job.h"

namespace fq::FQ_ISA {

// Finds the indices and norms of the tokens [t0 + lead, t1) of a tile that begins at t0, and asks
// for the next tile. Tokens that nobody may see borrow a neighbour's indices, which are harmless:
// their scores are masked and their factors are zero. Returns false for a bad block.
static bool find_tile(Call& call, const RowBlock& b, int t0, int lead, int t1,
                      const uint8_t** key_fields, const uint8_t** value_fields, const Scratch& s) {
  const RecordLayout& layout = call.layout;
  const int tile = tile_tokens(call.codec.head_dim), count = t1 - t0;
  if (t1 < b.end) {
    const Run next = find_run(call, b, t1, t1 + tile < b.end ? t1 + tile : b.end);
    for (int64_t i = 0; next.record && i < (int64_t)next.count * layout.record_bytes; i += 64) {
      __builtin_prefetch(next.record + i);
    }
  }
  for (int t = t0 + lead; t < t1;) {
    const Run run = find_run(call, b, t, t1);
    if (!run.record) return false;
    const uint8_t* record = run.record;
    for (const int end = t + run.count; t < end; ++t, record += layout.record_bytes) {
      const uint8_t* norms = record + layout.key_norm_offset;
      key_fields[t - t0] = record + layout.key_index_offset;
      value_fields[t - t0] = record + layout.value_index_offset;
      s.key_factor[t - t0] = load_norm(norms) * call.args.scale;
      s.value_factor[t - t0] = load_norm(norms + kNormBytes);
    }
  }
  for (int j = 0; j < tile; ++j) {
    if (j == lead) j = count;
    if (j == tile) break;
    key_fields[j] = key_fields[lead];
    value_fields[j] = value_fields[lead];
    s.key_factor[j] = s.value_factor[j] = 0.0f;
  }
  return true;
}

// Attends positions [begin, end) of one split from codes into `state`, which it clears first.
static void attend_split(Call& call, const RowBlock& b, int begin, int end, int first_position,
                         bool is_first, const Scratch& s, const State& state) {
  const FqCodec& codec = call.codec;
  const int head_dim = codec.head_dim, rows = rows_of(call, b), tile = tile_tokens(head_dim);
  const int context = context_len(call, b.req);
  const bool is_leading = end <= num_leading(call.args);
  const int reach = is_leading && call.args.keep_first > 0 ? 0 : call.args.reach;
  const int oldest = is_leading ? 0 : (int)num_leading(call.args);
  const FqKeyMap* map = is_leading ? nullptr : call.args.key_map;
  // By the split's number alone, so that a row has one path whatever its block.
  const bool has_plain =
      map && begin / kSplit * kSplit < map->num_plain && num_leading(call.args) == 0;
  if (call.byte_keys.num_runs > 0 && !is_leading && !has_plain) {
    return attend_split_bytes(call, b, begin, end, first_position, is_first, s, state);
  }
  const bool turns = map && map->turn_fine;
  const float* bias = map && !turns ? s.bias : nullptr;
  int step = -1;  // whose part of scores s.biases has
  const int num_coded = map ? map->num_coded : 0;
  const int num_plain = call.args.key_map ? (int)call.args.key_map->num_plain : 0;
  const int num_means = call.args.key_map ? call.args.key_map->num_first_means : 0;
  clear(state, rows, head_dim);
  for (int t0 = begin / tile * tile; t0 < end; t0 += tile) {
    const int t1 = t0 + tile < end ? t0 + tile : end;
    const int count = t1 - t0, rounded = (count + 7) & ~7;
    // Tokens before `begin` are nobody's: a sliding window may have freed their block, or they are
    // the leading split's. They are not read, and zero factors keep them out of every sum.
    const int lead = begin > t0 ? begin - t0 : 0;
    const float* hidden = nullptr;
    if (call.args.batch->copy_table &&
        (t0 < call.args.num_first || t1 > context - num_recent(call.args))) {
      const int num_hidden = hide_copies(call, b.req, t0, count, s.hidden);
      if (num_hidden == count) continue;
      if (num_hidden > 0) hidden = s.hidden;
    }
    const uint8_t *key_fields[kMaxTile], *value_fields[kMaxTile];
    if (!find_tile(call, b, t0, lead, t1, key_fields, value_fields, s)) return;
    if (num_coded > 0) {
      dot_mapped(*map, key_fields, s.query, rows, rounded, s.tile, s.scores);
    } else {
      call.key.dot(codec.key, key_fields, s.query, rows, head_dim, rounded, s.tile, s.scores);
    }
    if (turns && t0 / kStep != step) {
      step = t0 / kStep;
      turning_step(*map, b.kv_head, s.turning, s.bias, rows, step, s.turned, s.biases);
    }
    const float* biases = turns ? s.biases + t0 % kStep : nullptr;
    const bool has_first = t0 + lead < num_plain, has_means = t0 + lead < num_means;
    if (has_first) set_first_biases(*call.args.key_map, t0, count, rows, bias, biases, s);
    const Mask mask = {t0,
                       count,
                       first_position,
                       call.group_size,
                       reach,
                       oldest,
                       hidden,
                       has_first ? nullptr : bias,
                       has_first ? s.first_biases : biases};
    softmax_tile(s.scores, rows, s.key_factor, has_means ? s.ones : s.value_factor, mask,
                 call.args.soft_cap, state, s.alpha);
    if (has_means) add_first_values(num_means, count, rows, head_dim, s, state);
    call.value.axpy(codec.value, value_fields, s.scores, s.alpha, rows, head_dim, count, s.tile,
                    state.o);
  }
}

// Un-rotates s.total, adds raw tokens and sinks, and writes the row block's output.
static void finish(const Call& call, const RowBlock& b, const Scratch& s) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, rows = rows_of(call, b), group = call.group_size;
  for (int r = 0; r < rows; ++r) rotate(call.codec, s.total.o + (int64_t)r * head_dim, true);
  if (a.raw_key) {
    load_queries(call, b, Queries::kRaw, s, s.query_raw);
    attend_raw(call, b, s);
    merge(s.total, s.raw, rows, head_dim);
  }
  const int64_t token = a.batch->query_start_loc[b.req] + b.token;
  for (int r = 0; r < rows; ++r) {
    const int head = b.kv_head * group + r % group;
    float scale = 1.0f, l = s.total.l[r];
    if (a.sinks) {
      const float m = fmax2(s.total.m[r], a.sinks[head]);
      scale = exp1(s.total.m[r] - m);
      l = l * scale + exp1(a.sinks[head] - m);
    }
    scale = l == 0.0f ? 0.0f : scale / l;
    float* o = s.total.o + (int64_t)r * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store(o + i, load(o + i) * splat(scale));
    const int64_t at = (token + r / group) * a.stride_out_token + head * a.stride_out_head;
    store_row(a.out, at, a.dtype, head_dim, o);
  }
}

static void run_job(Call& call, const RowBlock& b, const Job& job, const Scratch& s) {
  const int head_dim = call.codec.head_dim, rows = rows_of(call, b);
  const int first_position = context_len(call, b.req) + b.token;
  const int leading = b.first_end > b.first_begin;
  if (job.split_begin == 0) prefetch_copies(call, b);
  if (b.partial < 0) clear(s.total, rows, head_dim);
  for (int i = job.split_begin; i < job.split_end; ++i) {
    const int split = b.begin / kSplit + i - leading;
    int begin = split * kSplit > b.begin ? split * kSplit : b.begin;
    int end = (split + 1) * kSplit < b.end ? (split + 1) * kSplit : b.end;
    if (i < leading) begin = b.first_begin, end = b.first_end;
    if (i == job.split_begin || i == leading) {
      load_queries(call, b, i < leading ? Queries::kFirst : Queries::kCodes, s, s.query);
      if (call.byte_keys.num_runs > 0 && i >= leading) {
        load_digits(call.byte_keys, rows, s.query, s.bytes);
      }
    }
    if (call.args.key_map && begin < call.args.key_map->num_first_means) {
      load_first_means(call, b, s);
    }
    const bool is_first = i == job.split_begin || i == leading;
    if (b.partial < 0) {
      attend_split(call, b, begin, end, first_position, is_first, s, s.split);
      merge(s.total, s.split, rows, head_dim);
    } else {
      float* at = call.partials + b.partial + i * state_floats(rows, head_dim);
      attend_split(call, b, begin, end, first_position, is_first, s, state_at(at, rows, head_dim));
    }
  }
  if (b.partial < 0) finish(call, b, s);
}

static void merge_partials(const Call& call, const RowBlock& b, const Scratch& s) {
  const int head_dim = call.codec.head_dim, rows = rows_of(call, b);
  clear(s.total, rows, head_dim);
  for (int i = 0; i < b.num_splits; ++i) {
    float* at = call.partials + b.partial + i * state_floats(rows, head_dim);
    merge(s.total, state_at(at, rows, head_dim), rows, head_dim);
  }
  finish(call, b, s);
}

// Attends what args.plan has planned. Returns 0, or 1 when a block table entry lies outside the
// cache.
static int paged_attention(const FqCodec& codec, const FqPages& pages, const FqAttend& args) {
  const Plan& plan = *static_cast<const Plan*>(args.plan);
  Call call = {
      codec,
      pages,
      args,
      layout_of(codec.head_dim, codec.key, codec.value),
      code_kernels(codec.key),
      code_kernels(codec.value),
      static_cast<float*>(call_scratch((size_t)plan.partial_floats * 4)),
      args.num_q_heads / pages.num_kv_heads,
      false,
      byte_keys(codec, args.key_map, args.dtype),
  };
  const RowBlock* blocks = plan.blocks();
  const Job* jobs = plan.jobs();
  const int64_t num_copied = args.batch->num_new * pages.num_kv_heads;
  const int byte_records = call.byte_keys.num_runs > 0 ? call.layout.record_bytes : 0;
  const int max_rows = call.group_size > kMaxRows ? call.group_size : kMaxRows;
#pragma omp parallel num_threads(args.num_threads) if (plan.is_parallel)
  {
    const Scratch scratch = make_scratch(codec.head_dim, max_rows, byte_records);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.num_jobs; ++i) {
      run_job(call, blocks[jobs[i].block], jobs[i], scratch);
    }
    if (plan.partial_floats > 0) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < plan.num_blocks; ++i) {
        if (blocks[i].partial >= 0) merge_partials(call, blocks[i], scratch);
      }
    }
    // Only now: a row may change hands in this step, and its old owner has just read it.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_copied; ++i) copy_new(call, i);
  }
  return call.bad_block ? 1 : 0;
}

}  // namespace fq::FQ_ISA
