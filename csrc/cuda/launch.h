// SPDX-License-Identifier: Apache-2.0
// Launching kernels: on a GPU, or in the emulator.
#pragma once

#include <atomic>

#include "cuda/attend.h"
#include "cuda/encode.h"

namespace fq {

struct Grid {
  int x, y, z, threads, shared_bytes;
};

#ifdef __CUDACC__

constexpr int kMaxDevices = 64;

// Lets a kernel have all of a device's shared memory, once per device.
template <auto kKernel>
cudaError_t allow_shared() {
  static std::atomic<bool> done[kMaxDevices];
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < kMaxDevices && done[device])) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess)  // or the driver may leave too little for two CTAs
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && device < kMaxDevices) done[device] = true;
  return error;
}

// Returns 0 or a cudaError_t.
template <auto kKernel, class Args>
int launch(Grid grid, void* stream, const Args& args) {
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t error = allow_shared<kKernel>();
    if (error != cudaSuccess) return error;
  }
  kKernel<<<dim3(grid.x, grid.y, grid.z), grid.threads, grid.shared_bytes,
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

template <auto kKernel, class Args>
int launch(Grid grid, void*, const Args& args) {
  if (emulator::machine().executor) {
    const int sizes[] = {grid.x, grid.y, grid.z, grid.threads, grid.shared_bytes};
    return emulator::machine().executor(__PRETTY_FUNCTION__, sizes, &args, (int)sizeof(args));
  }
  const Emulated<Args> emulated = {kKernel, args};
  emulator::run_grid({grid.x, grid.y, grid.z}, grid.threads, (size_t)grid.shared_bytes,
                     &Emulated<Args>::run, &emulated);
  return 0;
}

#endif

// The launchers of one head_dim, compiled by kernels.cu. They return 0 or a cudaError_t.
template <int kHeadDim>
struct Kernels {
  static TokenOrder token_order(int key_kind, int value_kind);
  static int encode(const EncodeArgs& args, bool is_mapped, void* stream);
  static int attend(AttendArgs args, bool is_mapped, SharedLimits limits, void* stream);
  static int usable();  // 0 if the current device can run them
};

}  // namespace fq
