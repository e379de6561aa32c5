// SPDX-License-Identifier: Apache-2.0
// What the CUDA library supports: instantiation, dispatch, error text and the table in docs/gpu.md
// all come from here.
#pragma once

#include <cstdint>

namespace fq {

// X(head_dim, columns): columns = query rows that share a decoded token in a wide row block.
#define FQ_HEAD_DIMS(X) X(64, 32) X(80, 32) X(96, 32) X(112, 32) X(128, 32) X(192, 16) X(256, 16)

// X(kind, subvec_dim, index_bits, folded, name). All have 256 stored rows.
#define FQ_CODES(X)                  \
  X(kK2, 2, 8, 0, "k2n256")          \
  X(kK2Folded, 2, 10, 1, "k2n1024f") \
  X(kK4, 4, 8, 0, "k4n256")          \
  X(kK4Folded, 4, 12, 1, "k4n4096f") \
  X(kK8, 8, 8, 0, "k8n256")

// X(key kind, value kind): pairs with a kernel of their own for decode, those of the presets. Every
// other pair of codes, and wide row blocks, take a kernel that finds out at run time.
#define FQ_PAIRS(X)       \
  X(kK2, kK2)             \
  X(kK4Folded, kK4Folded) \
  X(kK4, kK4)             \
  X(kK8, kK8)             \
  X(kK2Folded, kK4Folded) \
  X(kK2Folded, kK2)       \
  X(kK2, kK4Folded)       \
  X(kK2, kK4)             \
  X(kK4Folded, kK4)       \
  X(kK4Folded, kK8)       \
  X(kK4, kK4Folded)

// X(value kind): codes of values beside which transformed keys have a decode kernel of their own.
#define FQ_PRODUCT_VALUES(X) X(kK4) X(kK4Folded)

enum CodeKind : int32_t {
#define FQ_KIND(kind, dim, bits, folded, name) kind,
  FQ_CODES(FQ_KIND)
#undef FQ_KIND
      kNumKinds,
  kAnyKind = kNumKinds,
  kProduct  // of transformed keys: subvectors of 2, 4 and 8 coordinates in one record (key_map.h)
};

constexpr int kRows = 256;

template <int kKind>
struct Code;
#define FQ_CODE(kind, dim, bits, folded, name) \
  template <>                                  \
  struct Code<kind> {                          \
    static constexpr int kDim = dim;           \
    static constexpr int kBits = bits;         \
    static constexpr bool kFolded = folded;    \
  };
FQ_CODES(FQ_CODE)
#undef FQ_CODE

// The kind of a code, kNumKinds if there is none.
constexpr int32_t find_kind(int32_t subvec_dim, int32_t index_bits, int32_t folded) {
#define FQ_FIND(kind, dim, bits, fold, name) \
  if (subvec_dim == dim && index_bits == bits && folded == fold) return kind;
  FQ_CODES(FQ_FIND)
#undef FQ_FIND
  return kNumKinds;
}

}  // namespace fq
