// SPDX-License-Identifier: Apache-2.0
// The C ABI of libfibquant_cuda.so, and of the same kernels in the emulator.
#include <cstring>

#include "cuda/launch.h"

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fq {

#define FQ_EXTERN(dim, columns)                                                         \
  template <>                                                                           \
  int Kernels<dim>::encode(const EncodeArgs& args, void* stream);                       \
  template <>                                                                           \
  int Kernels<dim>::attend(const AttendArgs& args, int max_shared_bytes, void* stream); \
  template <>                                                                           \
  int Kernels<dim>::usable();
FQ_HEAD_DIMS(FQ_EXTERN)
#undef FQ_EXTERN

namespace {

// What the structs must be for a kernel to exist; fq_cuda_error names them.
enum Refusal { kBadHeadDim = -1, kBadCode = -2, kBadRecord = -3, kBadPages = -4 };

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

int max_shared_bytes = 0;

int shared_limit() {
#ifdef __CUDACC__
  // The devices of one process are taken to be alike.
  if (max_shared_bytes == 0) {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
#endif
  return max_shared_bytes;
}

}  // namespace

#ifndef __CUDACC__
emulator::Machine& emulator::machine() {
  static Machine only;
  return only;
}
#endif

}  // namespace fq

// Sizes of the ABI's structs, for the caller to compare with its own.
FQ_EXPORT void fq_cuda_abi(int64_t sizes[4]) {
  sizes[0] = sizeof(FqCudaCodec);
  sizes[1] = sizeof(FqPages);
  sizes[2] = sizeof(FqCudaEncode);
  sizes[3] = sizeof(FqCudaAttend);
}

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
#ifdef __CUDACC__
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    default:
      return "unknown error";
#endif
  }
}

// Both return 0, a Refusal or a cudaError_t; the work is queued on `stream`.
FQ_EXPORT int fq_cuda_encode_kv(const FqCudaCodec* codec, const FqPages* pages,
                                const FqCudaEncode* call, void* stream) {
  fq::EncodeArgs args = {*codec, *pages, *call, {}};
  const int refusal = fq::check(*codec, *pages, &args.layout);
  if (refusal || call->num_tokens == 0) return refusal;
  switch (codec->head_dim) {
#define FQ_CASE(dim, columns) \
  case dim:                   \
    return fq::Kernels<dim>::encode(args, stream);
    FQ_HEAD_DIMS(FQ_CASE)
#undef FQ_CASE
    default:
      return fq::kBadHeadDim;
  }
}

FQ_EXPORT int fq_cuda_paged_attention(const FqCudaCodec* codec, const FqPages* pages,
                                      const FqCudaAttend* call, void* stream) {
  const FqCudaCode &k = codec->key, &v = codec->value;
  fq::AttendArgs args = {};
  args.codec = *codec;
  args.pages = *pages;
  args.call = *call;
  args.key_kind = fq::find_kind(k.subvec_dim, k.index_bits, k.folded);
  args.value_kind = fq::find_kind(v.subvec_dim, v.index_bits, v.folded);
  const int refusal = fq::check(*codec, *pages, &args.layout);
  if (refusal || call->num_tokens == 0 || call->num_reqs == 0) return refusal;
  const int limit = fq::shared_limit();
  switch (codec->head_dim) {
#define FQ_CASE(dim, columns) \
  case dim:                   \
    return fq::Kernels<dim>::attend(args, limit, stream);
    FQ_HEAD_DIMS(FQ_CASE)
#undef FQ_CASE
    default:
      return fq::kBadHeadDim;
  }
}

#ifndef __CUDACC__
// Order of threads and shared memory of the emulated device, for tests.
FQ_EXPORT void fq_emulator_options(int reversed, int shared_bytes) {
  fq::emulator::machine().reversed = reversed != 0;
  fq::max_shared_bytes = shared_bytes;
}
#endif
