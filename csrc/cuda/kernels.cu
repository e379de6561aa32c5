// SPDX-License-Identifier: Apache-2.0
// The kernels of one head_dim, FQ_HEAD_DIM: one object file each, so that they compile in parallel.
#include "cuda/attend_kernel.h"
#include "cuda/copies.h"
#include "cuda/encode.h"
#include "cuda/launch.h"
#include "cuda/merge.h"
#include "cuda/prepare.h"

namespace fq {

namespace {

constexpr int wide_columns(int head_dim) {
#define FQ_COLUMNS(dim, columns) \
  if (head_dim == dim) return columns;
  FQ_HEAD_DIMS(FQ_COLUMNS)
#undef FQ_COLUMNS
  return 8;
}

// The best order of tokens for every pair of codes.
struct TokenOrders {
  TokenOrder of[kNumKinds][kNumKinds];
  TokenOrders() {
    for (int key = 0; key < kNumKinds; ++key) {
      for (int value = 0; value < kNumKinds; ++value)
        of[key][value] = best_order(FQ_HEAD_DIM, key, value);
    }
  }
};

template <int kKeyKind, int kValueKind, int kTiles, int kMapped = 0>
int launch_split(AttendArgs args, SharedLimits limits, void* stream) {
  using Shape = AttendShape<FQ_HEAD_DIM, kTiles, kMapped>;
  const FqCudaAttend& a = args.call;
  const int group = a.num_q_heads / args.pages.num_kv_heads;
  const int row_blocks = (int)(a.num_tokens * group / Shape::kColumns) + a.num_reqs;
  const Occupancy fill = Shape::occupancy(args.codec.record_bytes, limits);
  args.tiles_per_block = args.pages.block_size / kTokens;
  args.step_blocks = fill.warps / args.tiles_per_block;
  args.step_tiles = fill.warps % args.tiles_per_block;
  args.order = Kernels<FQ_HEAD_DIM>::token_order(args.key_kind, args.value_kind);
  args.bytes_1 = token_of(args.order, 1) * args.codec.record_bytes;
  args.bytes_8 = token_of(args.order, 8) * args.codec.record_bytes;
  const Grid grid = {row_blocks, args.pages.num_kv_heads, a.num_splits, fill.warps * kWarp,
                     fill.shared_bytes};
  return launch<&attend<FQ_HEAD_DIM, kKeyKind, kValueKind, kTiles, kMapped>>(grid, stream, args);
}

// The first tokens attended, and with a map rows of queries made ready; what is left then takes
// their state for one of raw new tokens.
template <int kMapped>
int launch_prepare(AttendArgs& args, void* stream) {
  FqCudaAttend& a = args.call;
  const int64_t rows = a.num_tokens * (a.num_q_heads / args.pages.num_kv_heads);
  const Grid grid = {(int)((rows + kPrepareWarps - 1) / kPrepareWarps), args.pages.num_kv_heads, 1,
                     kPrepareWarps * kWarp, prepare_shared_bytes(FQ_HEAD_DIM)};
  const int error = launch<&prepare<FQ_HEAD_DIM, kMapped>>(grid, stream, args);
  a.raw_o = args.prepared.first_o;
  a.raw_m = args.prepared.first_m;
  a.raw_l = args.prepared.first_l;
  return error;
}

// Copies attended; what is left then takes their state, joined with the call's, for one of raw new
// tokens.
int launch_copies(AttendArgs& args, void* stream) {
  FqCudaAttend& a = args.call;
  const int group = a.num_q_heads / args.pages.num_kv_heads;
  const int row_blocks = (int)(a.num_tokens * group / kCopyColumns) + a.num_reqs;
  const Grid grid = {row_blocks, args.pages.num_kv_heads, 1, kCopyWarps * kWarp,
                     copies_shared_bytes(FQ_HEAD_DIM)};
  const int error = launch<&attend_copies<FQ_HEAD_DIM>>(grid, stream, args);
  a.raw_o = args.prepared.first_o;
  a.raw_m = args.prepared.first_m;
  a.raw_l = args.prepared.first_l;
  return error;
}

int launch_mapped(const AttendArgs& args, SharedLimits limits, void* stream) {
  if (args.call.wide) {
    constexpr int kTiles = wide_columns(FQ_HEAD_DIM) / 8;
    return launch_split<kAnyKind, kAnyKind, kTiles, 1>(args, limits, stream);
  }
#define FQ_LAUNCH(v)                           \
  if (args.is_product && args.value_kind == v) \
    return launch_split<kProduct, v, 1, 1>(args, limits, stream);
  FQ_PRODUCT_VALUES(FQ_LAUNCH)
#undef FQ_LAUNCH
  return launch_split<kAnyKind, kAnyKind, 1, 1>(args, limits, stream);
}

int launch_plain(const AttendArgs& args, SharedLimits limits, void* stream) {
  if (args.call.wide) {
    constexpr int kTiles = wide_columns(FQ_HEAD_DIM) / 8;
    return launch_split<kAnyKind, kAnyKind, kTiles>(args, limits, stream);
  }
#define FQ_LAUNCH(k, v)                           \
  if (args.key_kind == k && args.value_kind == v) \
    return launch_split<k, v, 1>(args, limits, stream);
  FQ_PAIRS(FQ_LAUNCH)
#undef FQ_LAUNCH
  return launch_split<kAnyKind, kAnyKind, 1>(args, limits, stream);
}

}  // namespace

template <>
TokenOrder Kernels<FQ_HEAD_DIM>::token_order(int key_kind, int value_kind) {
  static const TokenOrders orders;
  return orders.of[key_kind][value_kind];
}

template <>
int Kernels<FQ_HEAD_DIM>::encode(const EncodeArgs& args, bool is_mapped, void* stream) {
  const int64_t num_vectors = args.call.num_tokens * args.pages.num_kv_heads;
  const int64_t wanted = (num_vectors + kEncodeWarps - 1) / kEncodeWarps;
  const int ctas = wanted < args.call.max_ctas ? (int)wanted : args.call.max_ctas;
  const Grid grid = {ctas, 2, 1, kEncodeWarps * kWarp, encode_shared_bytes(FQ_HEAD_DIM, is_mapped)};
  if (is_mapped) return launch<&fq::encode<FQ_HEAD_DIM, 1>>(grid, stream, args);
  return launch<&fq::encode<FQ_HEAD_DIM, 0>>(grid, stream, args);
}

template <>
int Kernels<FQ_HEAD_DIM>::attend(AttendArgs args, bool is_mapped, SharedLimits limits,
                                 void* stream) {
  const float soft_cap = args.call.soft_cap;
  args.cap_in = soft_cap > 0 ? 2 / soft_cap : 0;
  args.cap_out = soft_cap * kLog2e;
  args.has_raw = args.call.raw_o != nullptr;
  int error = 0;
  if (is_mapped) error = launch_prepare<1>(args, stream);
  if (args.call.keep_first > 0) error = launch_prepare<0>(args, stream);
  if (!error && args.call.copy_table) error = launch_copies(args, stream);
  if (error) return error;
  error = is_mapped ? launch_mapped(args, limits, stream) : launch_plain(args, limits, stream);
  if (error || args.call.num_splits == 1) return error;
  const int64_t rows = args.call.num_tokens * args.call.num_q_heads;
  const Grid grid = {(int)((rows + kMergeWarps - 1) / kMergeWarps), 1, 1, kMergeWarps * kWarp,
                     merge_shared_bytes(FQ_HEAD_DIM)};
  return launch<&merge<FQ_HEAD_DIM>>(grid, stream, args);
}

template <>
int Kernels<FQ_HEAD_DIM>::usable() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  const int error = cudaFuncGetAttributes(&attributes, merge<FQ_HEAD_DIM>);
  cudaGetLastError();
  return error;
#else
  return 0;
#endif
}

}  // namespace fq
