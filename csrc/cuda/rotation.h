// SPDX-License-Identifier: Apache-2.0
// The rotation of one vector by one warp.
#pragma once

#include "cuda/lanes.h"
#include "cuda/params.h"

namespace fq {

// Rotates a vector that a warp holds as lanes.h says; inverse: its transpose. `scratch`
// is float [kHeadDim] of shared memory of the warp, used when the rotation is a dense matrix.
template <int kHeadDim>
FQ_DEVICE void rotate(const FqCudaCodec& codec, float (&x)[kLaneCoords<kHeadDim>], float* scratch,
                      bool inverse) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const int first = lane_idx() * kPerLane;
  if constexpr ((kHeadDim & (kHeadDim - 1)) == 0) {  // Walsh-Hadamard, neighbours first
    if (!inverse) {
      for (int i = 0; i < kPerLane; ++i) x[i] *= codec.rotation_signs[first + i];
    }
#pragma unroll
    for (int half = 1; half < kPerLane; half *= 2) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i & half) continue;
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float other = shuffle_xor(x[i], mask);
        x[i] = lane_idx() & mask ? other - x[i] : x[i] + other;
      }
    }
    const float factor = 1.0f / square_root((float)kHeadDim);
    for (int i = 0; i < kPerLane; ++i) {
      x[i] *= factor;
      if (inverse) x[i] *= codec.rotation_signs[first + i];
    }
  } else {
    // y_i = sum_j matrix_t[j, i] x_j: lanes read neighbouring columns of a row.
    const float* matrix = inverse ? codec.rotation_matrix : codec.rotation_matrix_t;
    sync_warp();
    for (int i = 0; i < kPerLane; ++i) {
      if (holds<kHeadDim>(first + i)) scratch[first + i] = x[i];
    }
    sync_warp();
    for (int i = 0; i < kPerLane; ++i) x[i] = 0.0f;
    for (int j = 0; j < kHeadDim; ++j) {
      const float factor = scratch[j];
      for (int i = 0; i < kPerLane; ++i) {
        if (holds<kHeadDim>(first + i)) x[i] += matrix[j * kHeadDim + first + i] * factor;
      }
    }
    sync_warp();
  }
}

}  // namespace fq
