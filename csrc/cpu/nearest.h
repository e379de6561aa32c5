// SPDX-License-Identifier: Apache-2.0
// The nearest codewords of many subvectors, by the fastest search that a code has tables for.
#pragma once

#include "cpu/byte_search.h"
#include "cpu/search.h"

namespace fq::FQ_ISA {

template <int kDim>
static inline void nearest_all(const FqCode& code, int num_subvecs, const float* y,
                               uint32_t* index) {
  const int dim = kDim ? kDim : code.subvec_dim;
  int s = 0;
  if (code.num_cells) {
    const int most = kMaxPairs / code.num_lists;
    for (; s < num_subvecs; s += most) {
      nearest_listed<kDim>(code, num_subvecs - s < most ? num_subvecs - s : most, y + s * dim,
                           index + s);
    }
    return;
  }
#if defined(FQ_BYTES)
  if constexpr (kDim == 2) {
    if (code.squares) return nearest_in_squares(code, num_subvecs, y, index);
  }
  if constexpr (kDim == 4) {
    if (code.boxes) return nearest_in_boxes(code, num_subvecs, y, index);
  }
  if constexpr (kDim == 8) {
    if (code.scan) return nearest_scanned(code, num_subvecs, y, index);
  }
#endif
  for (; s + 4 <= num_subvecs; s += 4) nearest<kDim, 4>(code, y + s * dim, index + s);
  for (; s < num_subvecs; ++s) nearest<kDim, 1>(code, y + s * dim, index + s);
}

static inline void nearest_all(const FqCode& code, int num_subvecs, const float* y,
                               uint32_t* index) {
  switch (code.subvec_dim) {
    case 2:
      return nearest_all<2>(code, num_subvecs, y, index);
    case 4:
      return nearest_all<4>(code, num_subvecs, y, index);
    case 8:
      return nearest_all<8>(code, num_subvecs, y, index);
    case 16:
      return nearest_all<16>(code, num_subvecs, y, index);
    default:
      return nearest_all<0>(code, num_subvecs, y, index);
  }
}

}  // namespace fq::FQ_ISA
