// SPDX-License-Identifier: Apache-2.0
// The C ABI of libfibquant_cuda.so, and of the same kernels in the emulator.
#include <cstring>

#include "cuda/copy_plan.h"
#include "cuda/launch.h"

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fq {

#define FQ_EXTERN(dim, columns)                                                            \
  template <>                                                                              \
  TokenOrder Kernels<dim>::token_order(int key_kind, int value_kind);                      \
  template <>                                                                              \
  int Kernels<dim>::encode(const EncodeArgs& args, bool is_mapped, void* stream);          \
  template <>                                                                              \
  int Kernels<dim>::attend(AttendArgs args, bool is_mapped, SharedLimits limits, void* s); \
  template <>                                                                              \
  int Kernels<dim>::usable();
FQ_HEAD_DIMS(FQ_EXTERN)
#undef FQ_EXTERN

namespace {

// What the structs must be for a kernel to exist; fq_cuda_error names them.
enum Refusal {
  kBadHeadDim = -1,
  kBadCode = -2,
  kBadRecord = -3,
  kBadPages = -4,
  kBadMap = -5,
  kBadCopies = -6,
  kBadFirst = -7
};

int check(const FqCudaCodec& codec, const FqPages& pages, RecordLayout* layout) {
  for (const FqCudaCode* code : {&codec.key, &codec.value}) {
    if (find_kind(code->subvec_dim, code->index_bits, code->folded) == kNumKinds) return kBadCode;
    if (code->num_rows != kRows) return kBadCode;
  }
  *layout =
      record_layout(index_bytes(codec.head_dim / codec.key.subvec_dim, codec.key.index_bits),
                    index_bytes(codec.head_dim / codec.value.subvec_dim, codec.value.index_bits));
  if (layout->record_bytes != codec.record_bytes) return kBadRecord;
  const int64_t bits = (int64_t)(uintptr_t)pages.base | pages.stride_block | pages.stride_head;
  return bits % 16 || pages.block_size % kTokens ? kBadPages : 0;
}

// 0, or kBadMap if there is no kernel for this map of keys.
int check_map(const FqCudaCodec& codec, const FqPages& pages, const RecordLayout& layout,
              const FqCudaKeyMap& map) {
  const bool turns = map.num_turning > 0;
  bool fits = map.num_plain >= 0 && map.num_plain <= kMaxPlain && map.num_first <= map.num_plain &&
              map.num_plain <= pages.block_size && map.num_turning % 8 == 0 &&
              map.num_turning <= 8 * turn_steps(codec.head_dim) && (!turns || map.num_steps > 0);
  if (!map.key_matrix_t) return fits && map.num_coded == codec.head_dim ? 0 : kBadMap;
  int bytes = 0;
  for (int i = 0; i < 3; ++i) {
    bytes += map.num_subvecs[i];
    fits &= map.codes[i].subvec_dim == 2 << i && map.codes[i].index_bits == 8 &&
            !map.codes[i].folded && map.codes[i].num_rows == kRows;
  }
  fits &= Product::fits(map) && map.num_coded <= codec.head_dim;
  return fits && bytes == layout.value_index_offset ? 0 : kBadMap;
}

// 0, or kBadCopies.
int check_copies(const FqCudaAttend& a) {
  if (!a.copy_table) return 0;
  const bool fits = a.raw_o && a.copy_dtype != kFqFloat32 && a.num_copied_first >= 0 &&
                    a.num_copied_first <= a.num_copy_columns;
  const int64_t bits = (int64_t)(uintptr_t)a.copy_key | (int64_t)(uintptr_t)a.copy_value;
  return fits && bits % 16 == 0 ? 0 : kBadCopies;
}

// 0, or kBadFirst.
int check_first(const FqCudaAttend& a, bool has_map) {
  if (a.keep_first == 0) return 0;
  const bool fits = a.keep_first > 0 && a.first_query && !a.raw_o && !a.copy_table && !has_map;
  return fits ? 0 : kBadFirst;
}

SharedLimits shared_limits = {0, 0};

SharedLimits find_limits() {
#ifdef __CUDACC__
  // The devices of one process are taken to be alike.
  if (shared_limits.per_cta == 0) {
    SharedLimits found = {0, 0};
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&found.per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&found.per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    shared_limits = found;
  }
#endif
  return shared_limits;
}

}  // namespace

#ifndef __CUDACC__
emulator::Machine& emulator::machine() {
  static Machine only;
  return only;
}
#endif

}  // namespace fq

// The digest of the headers that this is built from (vllm_fibquant/headers.py), for the caller to
// compare with that of its own.
#define FQ_QUOTE(x) #x
#define FQ_QUOTED(x) FQ_QUOTE(x)
FQ_EXPORT const char* fq_cuda_abi() { return FQ_QUOTED(FQ_ABI); }

// What there are kernels for: lines of "head_dim <d> <wide columns>", "code <name> <subvec_dim>
// <index_bits> <folded>" and "pair <key code> <value code>".
FQ_EXPORT const char* fq_cuda_support() {
  return
#define FQ_TEXT(dim, columns) "head_dim " #dim " " #columns "\n"
      FQ_HEAD_DIMS(FQ_TEXT)
#undef FQ_TEXT
#define FQ_TEXT(kind, dim, bits, folded, name) \
  "code " #kind " " name " " #dim " " #bits " " #folded "\n"
          FQ_CODES(FQ_TEXT)
#undef FQ_TEXT
#define FQ_TEXT(key, value) "pair " #key " " #value "\n"
              FQ_PAIRS(FQ_TEXT)
#undef FQ_TEXT
                  ;
}

// How decode attention (wide: of many rows; mapped: of mapped keys) fills a multiprocessor that has
// so much shared memory: {CTAs, warps of each, bytes of each}; zeros where there is no kernel.
FQ_EXPORT void fq_cuda_occupancy(int head_dim, int record_bytes, int wide, int mapped, int per_cta,
                                 int per_sm, int32_t out[3]) {
  fq::Occupancy found = {0, 0, 0};
  const fq::SharedLimits limits = {per_cta, per_sm};
#define FQ_FIND(dim, columns)                                                                 \
  if (head_dim == dim) {                                                                      \
    if (wide && mapped)                                                                       \
      found = fq::AttendShape<dim, columns / 8, 1>::occupancy(record_bytes, limits);          \
    if (wide && !mapped)                                                                      \
      found = fq::AttendShape<dim, columns / 8>::occupancy(record_bytes, limits);             \
    if (!wide && mapped) found = fq::AttendShape<dim, 1, 1>::occupancy(record_bytes, limits); \
    if (!wide && !mapped) found = fq::AttendShape<dim, 1>::occupancy(record_bytes, limits);   \
  }
  FQ_HEAD_DIMS(FQ_FIND)
#undef FQ_FIND
  out[0] = found.ctas;
  out[1] = found.warps;
  out[2] = found.shared_bytes;
}

// The tokens of the rows of a tile with these codes, four bits each (token_order.h); 0 where there
// is no kernel.
FQ_EXPORT uint64_t fq_cuda_token_order(int head_dim, const FqCudaCode* key,
                                       const FqCudaCode* value) {
  fq::TokenOrder found = {};
  const int k = fq::find_kind(key->subvec_dim, key->index_bits, key->folded);
  const int v = fq::find_kind(value->subvec_dim, value->index_bits, value->folded);
#define FQ_FIND(dim, columns)                                      \
  if (head_dim == dim && k != fq::kNumKinds && v != fq::kNumKinds) \
    found = fq::Kernels<dim>::token_order(k, v);
  FQ_HEAD_DIMS(FQ_FIND)
#undef FQ_FIND
  return found.tokens;
}

// float32 elements of FqCudaAttend.prepared for each row, with this map of keys, or with copies or
// kept first tokens and without a map (null).
FQ_EXPORT int64_t fq_cuda_prepared_floats(int head_dim, const FqCudaKeyMap* map) {
  if (!map) return head_dim + 2;
  return fq::Prepared::floats(head_dim, map->num_turning);
}

// 0 if the current device can run the kernels of this build.
FQ_EXPORT int fq_cuda_usable() { return fq::Kernels<128>::usable(); }

FQ_EXPORT const char* fq_cuda_error(int error) {
  switch (error) {
    case 0:
      return "success";
    case fq::kBadHeadDim:
      return "no kernel for this head_dim";
    case fq::kBadCode:
      return "no kernel for this code";
    case fq::kBadRecord:
      return "record_bytes differs from the library's layout";
    case fq::kBadPages:
      return "pages must be 16-byte aligned with blocks of 16 tokens or a multiple";
    case fq::kBadMap:
      return "no kernel for this map of keys";
    case fq::kBadCopies:
      return "copies must be of 16 bits, 16-byte aligned, beside raw new tokens";
    case fq::kBadFirst:
      return "first tokens must be kept without a map of keys, copies and raw new tokens";
#ifdef __CUDACC__
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    default:
      return "unknown error";
#endif
  }
}

// Both return 0, a Refusal or a cudaError_t; the work is queued on `stream`. map: null if keys are
// coded as they are.
FQ_EXPORT int fq_cuda_encode_kv(const FqCudaCodec* codec, const FqPages* pages,
                                const FqCudaKeyMap* map, const FqCudaEncode* call, void* stream) {
  fq::EncodeArgs args = {*codec, *pages, *call, {}, {}};
  int refusal = fq::check(*codec, *pages, &args.layout);
  if (map && !refusal) refusal = fq::check_map(*codec, *pages, args.layout, args.map = *map);
  if (refusal || call->num_tokens == 0) return refusal;
  switch (codec->head_dim) {
#define FQ_CASE(dim, columns) \
  case dim:                   \
    return fq::Kernels<dim>::encode(args, map != nullptr, stream);
    FQ_HEAD_DIMS(FQ_CASE)
#undef FQ_CASE
    default:
      return fq::kBadHeadDim;
  }
}

FQ_EXPORT int fq_cuda_paged_attention(const FqCudaCodec* codec, const FqPages* pages,
                                      const FqCudaKeyMap* map, const FqCudaAttend* call,
                                      void* stream) {
  const FqCudaCode &k = codec->key, &v = codec->value;
  fq::AttendArgs args = {};
  args.codec = *codec;
  args.pages = *pages;
  args.call = *call;
  args.key_kind = fq::find_kind(k.subvec_dim, k.index_bits, k.folded);
  args.value_kind = fq::find_kind(v.subvec_dim, v.index_bits, v.folded);
  int refusal = fq::check(*codec, *pages, &args.layout);
  if (!refusal) refusal = fq::check_copies(*call);
  if (!refusal) refusal = fq::check_first(*call, map != nullptr);
  const int64_t rows = call->num_tokens * call->num_q_heads;
  args.num_apart = map ? map->num_plain : call->keep_first;
  if (!map && (call->copy_table || call->keep_first))
    args.prepared = fq::Prepared::states_at(call->prepared, rows, codec->head_dim);
  if (map && !refusal) {
    refusal = fq::check_map(*codec, *pages, args.layout, args.map = *map);
    args.prepared = fq::Prepared::at(call->prepared, rows, codec->head_dim, map->num_turning);
    args.product = fq::Product::of(*map);
    args.is_product = map->query_matrix_t != nullptr;
  }
  if (refusal || call->num_tokens == 0 || call->num_reqs == 0) return refusal;
  const fq::SharedLimits limits = fq::find_limits();
  switch (codec->head_dim) {
#define FQ_CASE(dim, columns) \
  case dim:                   \
    return fq::Kernels<dim>::attend(args, map != nullptr, limits, stream);
    FQ_HEAD_DIMS(FQ_CASE)
#undef FQ_CASE
    default:
      return fq::kBadHeadDim;
  }
}

// Returns 0 or a cudaError_t; the work is queued on `stream`.
FQ_EXPORT int fq_cuda_plan_copies(const FqCudaPlan* call, void* stream) {
  const auto grid_of = [](int64_t threads) {
    const int ctas = (int)((threads + fq::kPlanThreads - 1) / fq::kPlanThreads);
    return fq::Grid{ctas, 1, 1, fq::kPlanThreads, 0};
  };
  const int64_t entries = (int64_t)call->num_reqs * (call->num_first + call->num_recent);
  int error = 0;
  if (call->num_tokens > 0 && call->num_reqs > 0) {
    const fq::Grid tokens = grid_of(call->num_tokens);
    error = fq::launch<&fq::want_rows>(tokens, stream, *call);
    if (!error) error = fq::launch<&fq::take_rows>(tokens, stream, *call);
  }
  if (error || entries == 0) return error;
  return fq::launch<&fq::look_up_copies>(grid_of(entries), stream, *call);
}

#ifndef __CUDACC__
// Order of threads and shared memory of the emulated device, for tests.
FQ_EXPORT void fq_emulator_options(int reversed, int per_cta, int per_sm) {
  fq::emulator::machine().reversed = reversed != 0;
  fq::shared_limits = {per_cta, per_sm};
}

// Sets what runs launches; null for the emulator.
FQ_EXPORT void fq_emulator_executor(fq::emulator::Executor executor) {
  fq::emulator::machine().executor = executor;
}
#endif
