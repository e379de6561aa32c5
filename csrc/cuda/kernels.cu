// SPDX-License-Identifier: Apache-2.0
// The kernels of one head_dim, FQ_HEAD_DIM: one object file each, so that they compile in parallel.
#include "cuda/attend_kernel.h"
#include "cuda/encode.h"
#include "cuda/launch.h"
#include "cuda/merge.h"

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

template <int kKeyKind, int kValueKind, int kTiles>
int launch_split(AttendArgs args, SharedLimits limits, void* stream) {
  using Shape = AttendShape<FQ_HEAD_DIM, kTiles>;
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
  args.cap_in = a.soft_cap > 0 ? 2 / a.soft_cap : 0;
  args.cap_out = a.soft_cap * kLog2e;
  const Grid grid = {row_blocks, args.pages.num_kv_heads, a.num_splits, fill.warps * kWarp,
                     fill.shared_bytes};
  return launch<&attend<FQ_HEAD_DIM, kKeyKind, kValueKind, kTiles>>(grid, stream, args);
}

}  // namespace

template <>
TokenOrder Kernels<FQ_HEAD_DIM>::token_order(int key_kind, int value_kind) {
  static const TokenOrders orders;
  return orders.of[key_kind][value_kind];
}

template <>
int Kernels<FQ_HEAD_DIM>::encode(const EncodeArgs& args, void* stream) {
  const int64_t num_vectors = args.call.num_tokens * args.pages.num_kv_heads;
  const int64_t wanted = (num_vectors + kEncodeWarps - 1) / kEncodeWarps;
  const int ctas = wanted < args.call.max_ctas ? (int)wanted : args.call.max_ctas;
  const Grid grid = {ctas, 2, 1, kEncodeWarps * kWarp, encode_shared_bytes(FQ_HEAD_DIM)};
  return launch<&fq::encode<FQ_HEAD_DIM>>(grid, stream, args);
}

template <>
int Kernels<FQ_HEAD_DIM>::attend(const AttendArgs& args, SharedLimits limits, void* stream) {
  int error = -1;
  if (args.call.wide) {
    error = launch_split<kAnyKind, kAnyKind, wide_columns(FQ_HEAD_DIM) / 8>(args, limits, stream);
  }
#define FQ_LAUNCH(k, v)                                        \
  if (error < 0 && args.key_kind == k && args.value_kind == v) \
    error = launch_split<k, v, 1>(args, limits, stream);
  FQ_PAIRS(FQ_LAUNCH)
#undef FQ_LAUNCH
  if (error < 0) error = launch_split<kAnyKind, kAnyKind, 1>(args, limits, stream);
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
