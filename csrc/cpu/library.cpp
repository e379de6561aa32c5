// SPDX-License-Identifier: Apache-2.0
// The C ABI of libfibquant_cpu.so: chooses the instruction set and owns scratch memory.
#include <cstdlib>
#include <cstring>

#include "cpu/copy_pool.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"
#include "page_layout.h"

#define FQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace fq {

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
#endif

namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { free(data); }
  void* grow(size_t bytes) {
    if (bytes <= size) return data;
    const size_t wanted = (bytes + bytes / 4 + 63) & ~size_t{63};
    void* larger = aligned_alloc(64, wanted);
    if (!larger) abort();
    if (size) memcpy(larger, data, size);
    free(data);
    data = larger;
    size = wanted;
    return data;
  }
};

thread_local Buffer thread_buffer, call_buffer;

enum Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kNumIsas };
const char* const kIsaNames[kNumIsas] = {"portable", "avx2", "avx512", "avx512-vnni"};

bool supported(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (isa == kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == kAvx512) return avx512;
  if (isa == kAvx512Vnni) {
    return avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == kPortable;
}

int best_isa() {
  for (int isa = kNumIsas - 1; isa > 0; --isa) {
    if (supported(isa)) return isa;
  }
  return kPortable;
}

const Kernels* const* table() {
#if defined(__x86_64__)
  static const Kernels* const all[kNumIsas] = {&portable::kernels, &avx2::kernels, &avx512::kernels,
                                               &avx512_vnni::kernels};
#else
  static const Kernels* const all[kNumIsas] = {&portable::kernels, nullptr, nullptr, nullptr};
#endif
  return all;
}

int chosen_isa = -1;

const Kernels& kernels() {
  if (chosen_isa < 0) chosen_isa = best_isa();
  return *table()[chosen_isa];
}

}  // namespace

void* thread_scratch(size_t bytes) {
  void* data = thread_buffer.grow(bytes);
#if defined(FQ_POISON)  // tests: what is read before it is written is NaN
  memset(data, 0xFF, bytes);
#endif
  return data;
}
void* call_scratch(size_t bytes) { return call_buffer.grow(bytes); }

}  // namespace fq

// The digest of the headers that this is built from (vllm_fibquant/headers.py), for the caller to
// compare with that of its own.
#define FQ_QUOTE(x) #x
#define FQ_QUOTED(x) FQ_QUOTE(x)
FQ_EXPORT const char* fq_abi() { return FQ_QUOTED(FQ_ABI); }

// The record layout as the kernels see it: five int32 in the order of fq::RecordLayout.
FQ_EXPORT void fq_record_layout(int32_t head_dim, const FqCode* key, const FqCode* value,
                                int32_t out[5]) {
  const fq::RecordLayout layout = fq::layout_of(head_dim, *key, *value);
  memcpy(out, &layout, sizeof(layout));
}

FQ_EXPORT const char* fq_isa() {
  fq::kernels();
  return fq::kIsaNames[fq::chosen_isa];
}

// Chooses an instruction set by name; null chooses the best. Returns 0, or 1 when this CPU (or
// this build) does not have it.
FQ_EXPORT int fq_select_isa(const char* name) {
  int isa = fq::best_isa();
  if (name) {
    for (isa = 0; isa < fq::kNumIsas && strcmp(name, fq::kIsaNames[isa]) != 0;) ++isa;
  }
  if (isa == fq::kNumIsas || !fq::supported(isa)) return 1;
  fq::chosen_isa = isa;
  return 0;
}

FQ_EXPORT int64_t fq_encode_kv(const FqCodec* codec, const FqPages* pages, const FqEncode* args) {
  return fq::kernels().encode_kv(*codec, *pages, *args);
}

// Cuts the work of a batch into jobs: see plan.h.
FQ_EXPORT int64_t fq_plan(const FqCodec* codec, const FqPages* pages, const FqAttend* args,
                          void* out) {
  return fq::kernels().plan(*codec, *pages, *args, out);
}

FQ_EXPORT int fq_paged_attention(const FqCodec* codec, const FqPages* pages, const FqAttend* args) {
  return fq::kernels().paged_attention(*codec, *pages, *args);
}

FQ_EXPORT int64_t fq_encode_latents(const FqCodec* codec, const FqPages* pages,
                                    const FqEncodeLatents* args) {
  return fq::kernels().encode_latents(*codec, *pages, *args);
}

FQ_EXPORT int fq_attend_latents(const FqCodec* codec, const FqPages* pages,
                                const FqAttendLatents* args) {
  return fq::kernels().attend_latents(*codec, *pages, *args);
}

// Plans what a step reads from copies and what it copies: see copy_pool.h.
FQ_EXPORT int64_t fq_plan_copies(const FqCopyPool* pool, const FqBatch* batch, const int64_t* slots,
                                 int32_t* table, int64_t* tokens, int64_t* rows) {
  return fq::plan_copies(*pool, *batch, slots, table, tokens, rows);
}
