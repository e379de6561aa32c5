// SPDX-License-Identifier: Apache-2.0
// Launching kernels: on a GPU, or in the emulator.
#pragma once

#include "cuda/attend.h"
#include "cuda/encode.h"

namespace fq {

struct Grid {
  int x, y, z, threads, shared_bytes;
};

#ifdef __CUDACC__

// Returns 0 or a cudaError_t.
template <class Args>
int launch(void (*kernel)(Args), Grid grid, void* stream, const Args& args) {
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), grid.threads, grid.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

#else

template <class Args>
struct Emulated {
  void (*kernel)(Args);
  const Args& args;
  static void run(const void* self) {
    const auto* e = static_cast<const Emulated*>(self);
    e->kernel(e->args);
  }
};

template <class Args>
int launch(void (*kernel)(Args), Grid grid, void*, const Args& args) {
  const Emulated<Args> emulated = {kernel, args};
  emulator::run_grid({grid.x, grid.y, grid.z}, grid.threads, (size_t)grid.shared_bytes,
                     &Emulated<Args>::run, &emulated);
  return 0;
}

#endif

// The launchers of one head_dim, compiled by kernels.cu. They return 0 or a cudaError_t.
template <int kHeadDim>
struct Kernels {
  static int encode(const EncodeArgs& args, void* stream);
  static int attend(const AttendArgs& args, SharedLimits limits, void* stream);
  static int usable();  // 0 if the current device can run them
};

}  // namespace fq
