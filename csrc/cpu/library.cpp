// SPDX-License-Identifier: Apache-2.0
// The C ABI of libfibquant_cpu.so: chooses the instruction set and owns scratch memory.
#include <cstdlib>
#include <cstring>

#include "abi_text.h"
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

// The ABI's structs in words (abi_text.h), for the caller to compare with its own: those of codes
// and pages, and then those of calls.
static void describe_codes(fq::AbiText& abi) {
  {
    using S = FqCode;
    abi.add(sizeof(S), {FQ_FIELD(subvec_dim),   FQ_FIELD(index_bits),    FQ_FIELD(num_rows),
                        FQ_FIELD(folded),       FQ_FIELD(gain),          FQ_FIELD(num_rows_padded),
                        FQ_FIELD(rows),         FQ_FIELD(rows_t),        FQ_FIELD(half_sq),
                        FQ_FIELD(num_cells),    FQ_FIELD(num_lists),     FQ_FIELD(cell_tiles),
                        FQ_FIELD(list_tiles),   FQ_FIELD(list_begin),    FQ_FIELD(list_index),
                        FQ_FIELD(planes),       FQ_FIELD(plane_step),    FQ_FIELD(scan_scale),
                        FQ_FIELD(scan_most),    FQ_FIELD(scan_margin),   FQ_FIELD(scan),
                        FQ_FIELD(squares),      FQ_FIELD(square_planes), FQ_FIELD(square_low),
                        FQ_FIELD(square_scale), FQ_FIELD(boxes),         FQ_FIELD(box_sides),
                        FQ_FIELD(box_low),      FQ_FIELD(box_fine),      FQ_FIELD(box_scale),
                        FQ_FIELD(box_shift),    FQ_FIELD(box_reach),     FQ_FIELD(box_margin)});
  }
  {
    using S = FqCodec;
    abi.add(sizeof(S), {FQ_FIELD(head_dim), FQ_FIELD(record_bytes), FQ_FIELD(rotation_signs),
                        FQ_FIELD(rotation_matrix), FQ_FIELD(rotation_matrix_t), FQ_FIELD(key),
                        FQ_FIELD(value)});
  }
  {
    using S = FqPages;
    abi.add(sizeof(S), {FQ_FIELD(base), FQ_FIELD(num_blocks), FQ_FIELD(stride_block),
                        FQ_FIELD(stride_head), FQ_FIELD(num_kv_heads), FQ_FIELD(block_size)});
  }
}

static void describe_calls(fq::AbiText& abi) {
  {
    using S = FqEncode;
    abi.add(sizeof(S), {FQ_FIELD(key), FQ_FIELD(value), FQ_FIELD(slot_mapping),
                        FQ_FIELD(num_tokens), FQ_FIELD(stride_key_token), FQ_FIELD(stride_key_head),
                        FQ_FIELD(stride_value_token), FQ_FIELD(stride_value_head), FQ_FIELD(dtype),
                        FQ_FIELD(num_threads), FQ_FIELD(key_map), FQ_FIELD(positions)});
  }
  {
    using S = FqBatch;
    abi.add(sizeof(S), {FQ_FIELD(query_start_loc), FQ_FIELD(seq_lens), FQ_FIELD(block_table),
                        FQ_FIELD(copy_table), FQ_FIELD(new_tokens), FQ_FIELD(new_rows),
                        FQ_FIELD(stride_block_table), FQ_FIELD(num_new), FQ_FIELD(num_reqs),
                        FQ_FIELD(num_copy_columns)});
  }
  {
    using S = FqCopyPool;
    abi.add(sizeof(S), {FQ_FIELD(row_of_slot), FQ_FIELD(slot_of_row), FQ_FIELD(next),
                        FQ_FIELD(previous), FQ_FIELD(num_slots), FQ_FIELD(num_rows),
                        FQ_FIELD(num_first), FQ_FIELD(num_recent), FQ_FIELD(block_size)});
  }
  {
    using S = FqAttend;
    abi.add(sizeof(S), {FQ_FIELD(batch),
                        FQ_FIELD(plan),
                        FQ_FIELD(query),
                        FQ_FIELD(out),
                        FQ_FIELD(raw_key),
                        FQ_FIELD(raw_value),
                        FQ_FIELD(sinks),
                        FQ_FIELD(stride_query_token),
                        FQ_FIELD(stride_query_head),
                        FQ_FIELD(stride_out_token),
                        FQ_FIELD(stride_out_head),
                        FQ_FIELD(stride_raw_key_token),
                        FQ_FIELD(stride_raw_key_head),
                        FQ_FIELD(stride_raw_value_token),
                        FQ_FIELD(stride_raw_value_head),
                        FQ_FIELD(num_q_heads),
                        FQ_FIELD(dtype),
                        FQ_FIELD(window),
                        FQ_FIELD(scale),
                        FQ_FIELD(soft_cap),
                        FQ_FIELD(num_threads),
                        FQ_FIELD(copy_key),
                        FQ_FIELD(copy_value),
                        FQ_FIELD(copy_dtype),
                        FQ_FIELD(num_first),
                        FQ_FIELD(num_copy_rows),
                        FQ_FIELD(stride_copy_row),
                        FQ_FIELD(stride_copy_head),
                        FQ_FIELD(first_query),
                        FQ_FIELD(stride_first_query_token),
                        FQ_FIELD(stride_first_query_head),
                        FQ_FIELD(keep_first),
                        FQ_FIELD(key_map)});
  }
  {
    using S = FqKeyMap;
    abi.add(sizeof(S), {FQ_FIELD(mean),
                        FQ_FIELD(num_plain),
                        FQ_FIELD(key_matrix_t),
                        FQ_FIELD(key_halves_t),
                        FQ_FIELD(query_matrix_t),
                        FQ_FIELD(weight),
                        FQ_FIELD(source_scale),
                        FQ_FIELD(num_coded),
                        FQ_FIELD(num_subvecs),
                        FQ_FIELD(codes),
                        FQ_FIELD(turn_pairs),
                        FQ_FIELD(turn_mean),
                        FQ_FIELD(turn_fine),
                        FQ_FIELD(turn_coarse),
                        FQ_FIELD(turn_columns),
                        FQ_FIELD(turn_dense),
                        FQ_FIELD(num_positions),
                        FQ_FIELD(num_turning),
                        FQ_FIELD(num_fast),
                        FQ_FIELD(num_columns),
                        FQ_FIELD(num_fast_columns),
                        FQ_FIELD(num_first_means),
                        FQ_FIELD(first_key),
                        FQ_FIELD(first_value)});
  }
  {
    using S = FqEncodeLatents;
    abi.add(sizeof(S), {FQ_FIELD(latent), FQ_FIELD(rotary), FQ_FIELD(slot_mapping),
                        FQ_FIELD(num_tokens), FQ_FIELD(stride_latent), FQ_FIELD(stride_rotary),
                        FQ_FIELD(rotary_dim), FQ_FIELD(dtype), FQ_FIELD(num_threads)});
  }
  {
    using S = FqAttendLatents;
    abi.add(sizeof(S),
            {FQ_FIELD(query), FQ_FIELD(out), FQ_FIELD(block_table), FQ_FIELD(seq_lens),
             FQ_FIELD(stride_query_req), FQ_FIELD(stride_query_head), FQ_FIELD(stride_block_table),
             FQ_FIELD(num_reqs), FQ_FIELD(num_heads), FQ_FIELD(rotary_dim), FQ_FIELD(dtype),
             FQ_FIELD(num_threads), FQ_FIELD(scale)});
  }
}

FQ_EXPORT const char* fq_abi() {
  static const fq::AbiText abi = [] {
    fq::AbiText text;
    describe_codes(text);
    describe_calls(text);
    return text;
  }();
  return abi.text();
}

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
