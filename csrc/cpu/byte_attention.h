// SPDX-License-Identifier: Apache-2.0
// Attention over the codes of one split with dot products of bytes.
//
// A query's coordinates and a token's weights become 16-bit integers of two digits, so a product
// with a codeword's bytes is two products of bytes, or four where codewords have a low byte too:
// with keys that of two low bytes is left out. Keys: signed digits, unsigned codewords. Values:
// unsigned digits, signed codewords. That is near enough for models in 16 bits; those in float32
// are attended in floats.
//
// A split is one softmax: scores of all its tokens, then weights, then their sum. Integer sums have
// no order, and floats are added at fixed positions of the split, so a row's bits do not depend on
// which rows or tokens share its call.
#pragma once

#include "cpu/byte_gemm.h"
#include "cpu/dense.h"

#if defined(FQ_BYTES)

namespace fq::FQ_ISA {

// ---- queries ------------------------------------------------------------------------------------

// Bytes of coordinates in their order to those of a unit's vectors (byte_codes.h).
constexpr Order make_digit_order(int dim) {
  Order o = {};
  for (int i = 0; i < 64; ++i) {
    const int unit = i / (4 * dim), c = i % (4 * dim) / 4, subvec = i % 4;
    o.at[i] = (uint8_t)((4 * unit + subvec) * dim + c);
  }
  return o;
}
constexpr Order kDigitOrders[3] = {make_digit_order(2), make_digit_order(4), make_digit_order(8)};

static inline int32_t sum_lanes(vi x) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// Digits of one query [keys.dim], whose coordinates are first multiplied by the step of their
// planes.
static void load_query_digits(const ByteKeys& keys, const float* q, int row, const ByteScratch& s) {
  constexpr float kLargest = 32639.0f;  // 127 * 256 + 127
  alignas(64) float scaled[kMaxByteDim + 64] = {};
  for (int n = 0; n < keys.num_runs; ++n) {
    const ByteRun& run = keys.runs[n];
    const int end = run.first + run.num_subvecs * run.code->subvec_dim;
    for (int i = run.first; i < end; ++i) scaled[i] = q[i] * run.code->plane_step;
  }
  vf largest = {}, poison = {};
  for (int i = 0; i < keys.dim; i += kLanes) {
    const vf x = load(scaled + i);
    largest = vmax(largest, vabs(x));
    poison = poison + x * 0.0f;  // NaN where x is, or is infinite
  }
  const float top = fmax2(max_lane(largest), 1e-30f);
  const vf inverse = splat(kLargest / top);

  uint8_t* const high = s.digits + (int64_t)row * kDigitStride;
  uint8_t* const low = high + kDigitStride / 2;
  vi sum_high = {}, sum_low = {}, sum_second = {};
  for (int n = 0; n < keys.num_runs; ++n) {
    const ByteRun& run = keys.runs[n];
    const int run_dim = run.code->subvec_dim, size = run.num_subvecs * run_dim;
    const vb order = load_bytes(kDigitOrders[run_dim / 4].at);
    for (int i = 0; i < size; i += 64) {
      alignas(64) uint8_t digit[2][64];
      for (int j = 0; j < 64; j += kLanes) {
        const vf x = load(scaled + run.first + i + j) * inverse;
        vi number;
        for (int l = 0; l < kLanes; ++l) number[l] = i + j + l;
        // Behind the run there are coordinates of the next one.
        const vi whole = to_ints(number < size ? x : vf{});
        store_low_bytes(digit[0] + j, (whole + 128) >> 8);
        store_low_bytes(digit[1] + j, whole);
      }
      const vb a = permute(order, load_bytes(digit[0])), b = permute(order, load_bytes(digit[1]));
      store_bytes(high + run.high * 4 + i, a);
      store_bytes(low + run.high * 4 + i, b);
      sum_high = dot_bytes(sum_high, splat_byte(1), a);
      sum_low = dot_bytes(sum_low, splat_byte(1), b);
      if (run.code->subvec_dim == 2) sum_second = dot_bytes(sum_second, splat_byte(1), a);
    }
  }
  // Keys' bytes are 128 more than their planes', and those of a folded code 1/2 less than meant.
  const int32_t a = sum_lanes(sum_high), b = sum_lanes(sum_low) + sum_lanes(sum_second);
  s.digit_start[2 * row] = -128 * a;
  s.digit_start[2 * row + 1] = -128 * b;
  s.digit_half[row] = keys.runs[0].code->folded ? 0.5f * (256.0f * (float)a + (float)b) : 0.0f;
  s.digit_scale[row] = top / kLargest + sum(poison);
}

static void load_digits(const ByteKeys& keys, int rows, const float* q, const ByteScratch& s) {
  for (int r = 0; r < rows; ++r) load_query_digits(keys, q + r * keys.dim, r, s);
}

// ---- one softmax --------------------------------------------------------------------------------

// Tokens of a split: positions [begin, end) are some row's, those from `from` to `to`, multiples
// of 16 around them, have scores.
struct SplitRange {
  int start;  // position of the split
  int begin, end, from, to;
};

// Weights of one row from its scores [kSplit], as digits, and its part of state.
static void weigh_row(int row, const SplitRange& at, int oldest, int newest, float soft_cap,
                      const float* hidden, const float* bias, const float* biases, bool is_folded,
                      const ByteScratch& s, const State& state) {
  float* scores = s.scores + (int64_t)row * kSplit;
  const vi lane = lane_numbers();
  vf largest = splat(kMinusInf);
  for (int t = at.from; t < at.to; t += kLanes) {
    const int i = t - at.start;
    vf x = load(scores + i) * load(s.key_factor + i);
    if (bias) x = x + splat(bias[row]);
    if (biases) x = x + load(biases + (int64_t)row * kSplit + i);
    if (soft_cap > 0.0f) x = splat(soft_cap) * vtanh(x * splat(1.0f / soft_cap));
    if (hidden) x = x + load(hidden + i);
    if (t < oldest || t + kLanes - 1 > newest) {
      const vi token = lane + t;
      x = select((token <= newest) & (token >= oldest), x, splat(kMinusInf));
    }
    store(scores + i, x);
    largest = vmax(largest, x);
  }
  const float m = fmax2(kEmptyMax, max_lane(largest));
  vf total = {}, heaviest = {};
  for (int t = at.from; t < at.to; t += kLanes) {
    const int i = t - at.start;
    const vf weight = vexp(load(scores + i) - splat(m));
    total = total + weight;
    const vf x = weight * load(s.value_factor + i);
    store(scores + i, x);
    heaviest = vmax(heaviest, x);
  }
  state.m[row] = m;
  state.l[row] = sum(total);

  constexpr float kLargest = 65535.0f;
  const float top = max_lane(heaviest);
  const bool any = top > 1e-30f;
  const vf inverse = splat(any ? kLargest / top : 0.0f);
  uint8_t* high = s.weights + (int64_t)row * 2 * kSplit;
  vi digits = {};
  for (int t = at.from; t < at.to; t += kLanes) {
    const int i = t - at.start;
    const vi x = to_ints(load(scores + i) * inverse);
    digits = digits + x;
    store_low_bytes(high + i, x >> 8);
    store_low_bytes(high + kSplit + i, x);
  }
  s.weight_scale[row] = any ? top / kLargest : 0.0f;
  // What inverted bytes leave out of both digits' sums, 1/2 of each plane's.
  s.weight_half[row] = is_folded ? 0.5f * (float)sum_lanes(digits) : 0.0f;
}

// ---- records ------------------------------------------------------------------------------------

// Copies the records of the 16 tokens from t on, zeros in place of those outside the range.
// Returns false for a bad block.
static bool copy_group(Call& call, const RowBlock& b, int t, const SplitRange& range,
                       uint8_t* copy) {
  const int64_t stride = call.layout.record_bytes;
  memset(copy, 0, (size_t)(kGroup * stride));
  const int end = t + kGroup < range.end ? t + kGroup : range.end;
  for (int i = t > range.begin ? t : range.begin; i < end;) {
    const Run run = find_run(call, b, i, end);
    if (!run.record) return false;
    memcpy(copy + (i - t) * stride, run.record, (size_t)(run.count * stride));
    i += run.count;
  }
  return true;
}

// The groups of a chunk that begins at t: in their page, or copies of those that are not
// consecutive or reach outside the range. Returns their number, 0 for a bad block.
static inline int find_groups(Call& call, const RowBlock& b, int t, const SplitRange& range,
                              const ByteScratch& s, Records* groups) {
  const int64_t stride = call.layout.record_bytes;
  const int to = t + kChunkTokens < range.to ? t + kChunkTokens : range.to;
  int n = 0;
  while (t < to) {
    if (t >= range.begin && t + kGroup <= range.end) {
      const Run run = find_run(call, b, t, to < range.end ? to : range.end);
      if (!run.record) return 0;
      const uint8_t* record = run.record;
      for (int left = run.count; left >= kGroup; left -= kGroup, t += kGroup) {
        groups[n++] = {record, stride};
        record += kGroup * stride;
      }
      if (run.count >= kGroup) continue;
    }
    uint8_t* copy = s.records + n * kGroup * stride;
    if (!copy_group(call, b, t, range, copy)) return 0;
    groups[n++] = {copy, stride};
    t += kGroup;
  }
  return n;
}

// Norms of a chunk. Read apart from being converted, which would wait for the stores.
struct ChunkNorms {
  alignas(64) uint16_t key[kChunkTokens];
  alignas(64) uint16_t value[kChunkTokens];
};

static inline void read_norms(const Call& call, const Records* groups, int num_groups,
                              ChunkNorms* norms) {
  const auto read = [&](int offset, uint16_t* out) {
    for (int g = 0; g < num_groups; ++g) {
      const uint8_t* p = groups[g].at + offset;
      for (int i = 0; i < kGroup; ++i, p += groups[g].stride) memcpy(out + g * kGroup + i, p, 2);
    }
  };
  read(call.layout.key_norm_offset, norms->key);
  read(call.layout.value_norm_offset, norms->value);
}

// Factors of a chunk's tokens from its norms, times `scale`.
static inline void load_factors(const uint16_t* norms, int count, float scale, float* out) {
  load_row(norms, 0, kFqFloat16, count, out);
  for (int i = 0; i < count; i += kLanes) store(out + i, load(out + i) * splat(scale));
}

// Asks for the records of [t, end) to be in the cache soon, a few at a time: more requests than a
// core can have under way make it wait.
struct Prefetcher {
  Call& call;
  const RowBlock& b;
  int t, end;
  const uint8_t* record;
  int64_t left;  // bytes of consecutive records

  void next(int num_tokens) {
    for (int64_t i = num_tokens * (int64_t)call.layout.record_bytes; i > 0; i -= 64) {
      if (left <= 0) {
        if (t >= end) return;
        const Run run = find_run(call, b, t, end);
        if (!run.record) return;
        record = run.record;
        left = (int64_t)run.count * call.layout.record_bytes;
        t += run.count;
      }
      __builtin_prefetch(record);
      record += 64;
      left -= 64;
    }
  }
};

// ---- a split ------------------------------------------------------------------------------------

constexpr int kDecoded = 2;  // groups decoded between requests to memory

// Products of all rows with all keys, and the norms. Returns false for a bad block. `pace` halves
// of a token's records are asked for with each token.
static bool score_split(Call& call, const RowBlock& b, const SplitRange& range, int rows, int pace,
                        Prefetcher* ahead, const ByteScratch& s) {
  const ByteKeys& keys = call.byte_keys;
  const RecordLayout& layout = call.layout;
  const int64_t group_bytes = (keys.num_high + keys.num_low) * 64;
  for (int t = range.from; t < range.to; t += kChunkTokens) {
    Records groups[kChunkGroups];
    const int n = find_groups(call, b, t, range, s, groups);
    if (n == 0) return false;
    ChunkNorms norms;
    read_norms(call, groups, n, &norms);
    for (int g = 0; g < n; g += kDecoded) {
      ahead->next(pace * kDecoded * kGroup / 2);
      for (int r = 0; r < keys.num_runs; ++r) {
        const ByteRun& run = keys.runs[r];
        const int count = n - g < kDecoded ? n - g : kDecoded;
        Records part[kDecoded];
        for (int i = 0; i < count; ++i) {
          part[i] = groups[g + i];
          part[i].at += layout.key_index_offset + run.offset;
        }
        run.kernels.decode_keys(*run.code, run.num_subvecs, part, count, group_bytes, run.high,
                                keys.num_high + run.high, s.tile + g * group_bytes);
      }
    }
    const int i = t - range.start, count = n * kGroup;
    load_factors(norms.key, count, call.args.scale, s.key_factor + i);
    load_factors(norms.value, count, 1.0f, s.value_factor + i);
    dot_chunk(keys, rows, n, group_bytes, s, i);
  }
  return true;
}

// Sums of the values of all tokens by their weights' digits. Returns false for a bad block.
static bool add_split(Call& call, const RowBlock& b, const SplitRange& range, int rows,
                      Prefetcher* ahead, const ByteScratch& s) {
  const FqCode& code = call.codec.value;
  const ByteKernels kernels = byte_kernels(code);
  const int num_subvecs = call.codec.head_dim / code.subvec_dim;
  const int columns = num_columns(code, num_subvecs);
  const int64_t group_bytes = columns * (code.subvec_dim == 2 ? 2 : 1) * 64 * (kGroup / 4);
  memset(s.sums, 0, (size_t)rows * num_sums(code.subvec_dim == 2) * columns * 64);
  for (int t = range.from; t < range.to; t += kChunkTokens) {
    Records groups[kChunkGroups];
    const int n = find_groups(call, b, t, range, s, groups);
    if (n == 0) return false;
    for (int g = 0; g < n; ++g) groups[g].at += call.layout.value_index_offset;
    for (int g = 0; g < n; g += kDecoded) {
      ahead->next(kDecoded * kGroup / 2);
      kernels.decode_values(code, num_subvecs, groups + g, n - g < kDecoded ? n - g : kDecoded,
                            s.tile + g * group_bytes);
    }
    add_chunk(code.subvec_dim == 2, columns, rows, n, s, t - range.start);
  }
  return true;
}

// The rows' outputs from their sums.
static void store_split(const Call& call, int rows, const ByteScratch& s, const State& state) {
  const FqCode& code = call.codec.value;
  const ByteKernels kernels = byte_kernels(code);
  const int head_dim = call.codec.head_dim, dim = code.subvec_dim;
  const int columns = num_columns(code, head_dim / dim);
  const float unit = dim == 2 ? 257.0f / 256.0f : 1.0f;  // both planes' halves
  for (int r = 0; r < rows; ++r) {
    const vf scale = splat(s.weight_scale[r] * code.plane_step), half = splat(s.weight_half[r]);
    const int32_t* sums = s.sums + (int64_t)r * num_sums(dim == 2) * columns * 16;
    alignas(64) float out[kMaxByteDim + 8 * 16];
    for (int first = 0; first < columns; first += dim) {
      vf x[8];
      for (int c = 0; c < dim; ++c) {
        const vf a = to_floats(load_ints(sums + (first + c) * 16));
        vf b = to_floats(load_ints(sums + (columns + first + c) * 16));
        if (dim == 2) {
          const vf low = to_floats(load_ints(sums + (2 * columns + first + c) * 16));
          b = madd(low, splat(1.0f / 256.0f), b);
        }
        x[c] = (madd(a, splat(256.0f), b) + half * unit) * scale;
      }
      kernels.store_columns(x, out + first * 16);
    }
    memcpy(state.o + (int64_t)r * head_dim, out, (size_t)head_dim * 4);
  }
}

// Parts of scores that turn with the position, of all tokens of a split.
static void load_turning(const Call& call, const RowBlock& b, const SplitRange& range, int rows,
                         const Scratch& s) {
  for (int t = range.from / kStep * kStep; t < range.to; t += kStep) {
    turning_step(*call.args.key_map, b.kv_head, s.turning, s.bias, rows, t / kStep, s.turned,
                 s.biases);
    for (int r = 0; r < rows; ++r) {
      memcpy(s.bytes.biases + (int64_t)r * kSplit + t - range.start, s.biases + r * kStep,
             sizeof(float) * kStep);
    }
  }
}

// attend_split for calls with call.byte_keys; never of the leading split.
static void attend_split_bytes(Call& call, const RowBlock& b, int begin, int end,
                               int first_position, bool is_first, const Scratch& s,
                               const State& state) {
  const FqAttend& a = call.args;
  const int head_dim = call.codec.head_dim, rows = rows_of(call, b);
  const int start = begin / kSplit * kSplit, next = end;
  clear(state, rows, head_dim);
  const float* hidden = nullptr;
  const int context = context_len(call, b.req);
  if (a.batch->copy_table && (begin < a.num_first || end > context - num_recent(a))) {
    // The newest tokens are hidden together: their codes need not be read.
    while (end > begin && copy_row(call, b.req, end - 1) >= 0) --end;
    if (end == begin) return;
    for (int t = begin / kGroup * kGroup; t < round_up(end, kGroup); ++t) {
      const bool hide = t >= begin && t < end && copy_row(call, b.req, t) >= 0;
      s.bytes.hidden[t - start] = hide ? kMinusInf : 0.0f;
      if (hide) hidden = s.bytes.hidden;
    }
  }
  const SplitRange range = {start, begin, end, begin / kGroup * kGroup, round_up(end, kGroup)};
  // Half of the next split's records are asked for with the keys, half with the values. Those of
  // a job's first split are so only now.
  constexpr int kAhead = 2 * kChunkTokens;
  Prefetcher ahead = {call, b, is_first ? begin : next, b.end, nullptr, 0};
  if (is_first) ahead.next(kAhead);
  if (!score_split(call, b, range, rows, is_first ? 2 : 1, &ahead, s.bytes)) return;
  const FqKeyMap* map = a.key_map;
  const bool turns = map && map->turn_fine;
  if (turns) load_turning(call, b, range, rows, s);
  for (int r = 0; r < rows; ++r) {
    const int position = first_position + r / call.group_size;
    const int oldest = first_seen(a.reach, position);
    weigh_row(r, range, oldest > begin ? oldest : begin, position < end - 1 ? position : end - 1,
              a.soft_cap, hidden, map && !turns ? s.bias : nullptr,
              turns ? s.bytes.biases : nullptr, call.codec.value.folded, s.bytes, state);
  }
  if (!add_split(call, b, range, rows, &ahead, s.bytes)) return;
  store_split(call, rows, s.bytes, state);
}

}  // namespace fq::FQ_ISA

#else

namespace fq::FQ_ISA {

static inline void load_digits(const ByteKeys&, int, const float*, const ByteScratch&) {}
static inline void attend_split_bytes(Call&, const RowBlock&, int, int, int, bool, const Scratch&,
                                      const State&) {}

}  // namespace fq::FQ_ISA

#endif  // FQ_BYTES
