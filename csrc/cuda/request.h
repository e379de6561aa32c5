// SPDX-License-Identifier: Apache-2.0
// Whose a token is.
#pragma once

#include "cuda/warp.h"

namespace fq {

// The last request that begins at or before a token; `a` has query_start_loc and num_reqs.
template <class Args, class Token>
FQ_DEVICE int request_of(const Args& a, Token token) {
  int low = 0, high = a.num_reqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.query_start_loc[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace fq
