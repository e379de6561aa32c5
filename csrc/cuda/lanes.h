// SPDX-License-Identifier: Apache-2.0
// Which coordinates of a vector a lane holds, and how those of values lie in a product.
#pragma once

#include "cuda/warp.h"

namespace fq {

// A lane holds neighbouring coordinates, from lane_idx() * kLaneCoords on. Where a warp does
// not divide head_dim the last lanes hold fewer, or none: beyond are zeros, and not in memory.
template <int kHeadDim>
constexpr int kLaneCoords = (kHeadDim + kWarp - 1) / kWarp;

template <int kHeadDim>
FQ_DEVICE bool holds(int coord) {
  return kHeadDim % kWarp == 0 || coord < kHeadDim;
}

// The lane's coordinates of a row in memory.
template <int kHeadDim>
FQ_DEVICE void load_own(const float* row, float (&to)[kLaneCoords<kHeadDim>]) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const int first = lane_idx() * kPerLane;
  if constexpr (kHeadDim % kWarp == 0) {
    load_floats(row + first, to);
  } else {
    for (int i = 0; i < kPerLane; ++i) to[i] = holds<kHeadDim>(first + i) ? row[first + i] : 0.0f;
  }
}

template <int kHeadDim>
FQ_DEVICE void store_own(const float (&from)[kLaneCoords<kHeadDim>], float* row) {
  constexpr int kPerLane = kLaneCoords<kHeadDim>;
  const int first = lane_idx() * kPerLane;
  for (int i = 0; i < kPerLane; ++i) {
    if (holds<kHeadDim>(first + i)) row[first + i] = from[i];
  }
}

// Of O^T, lane 4 g + t has two coordinates in each step: of the first ones, as many as a warp
// divides, neighbouring steps have neighbouring coordinates; the 16 that may be left over are one
// more step.
template <int kHeadDim>
constexpr int kWholeCoords = kHeadDim / kWarp * kWarp;

template <int kHeadDim>
FQ_DEVICE int value_coord(int g, int step) {
  constexpr int kWhole = kWholeCoords<kHeadDim>;
  return step < kWhole / 16 ? g * (kWhole / 8) + 2 * step : kWhole + 2 * g;
}

}  // namespace fq
