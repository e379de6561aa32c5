// SPDX-License-Identifier: Apache-2.0
// Runs the kernels on a CPU: the interface of warp.h for a C++ compiler, as a test tool.
//
// A CTA's threads are fibers. One runs until it needs the others (a warp collective or a barrier);
// when every lane of its warp has arrived at the same call, the collective is computed for all 32.
// What a GPU would let pass silently stops the program: lanes that meet at different calls, a lane
// that returned early, a deadlock, a write beyond the requested shared memory. Shared memory begins
// as NaN bytes, and asynchronous copies land as late as the program allows.
//
// Fragment layouts are transcribed from the PTX ISA, independently of the kernels that use them.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define FQ_DEVICE inline
#define FQ_BOTH inline
#define FQ_KERNEL(threads, ctas) void
#define FQ_PARAM const

namespace fq {

namespace emulator {

enum class Call { kRunning, kDone, kBarrier, kWarp, kShuffle, kAny, kMma, kTranspose };

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  ucontext_t context;
  Call call;
  uint32_t in[10], out[4];  // operands and results of the collective the thread waits in
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Cta {
  Dim3 idx, grid;
  int num_threads;
  uint8_t* shared;
};

constexpr size_t kStack = 128 << 10, kGuard = 256;

// What runs launches in the emulator's place, if anything (tests/ptx): it is told the kernel, as
// "... kKernel = fq::name<numbers>; ...", the grid, threads and bytes of shared memory, and the
// kernel's argument. Returns 0 or an error number.
using Executor = int (*)(const char* kernel, const int sizes[5], const void* args, int args_bytes);

struct Machine {
  Executor executor = nullptr;
  Cta cta;
  std::vector<Thread> threads;
  std::vector<uint8_t> stacks;
  std::vector<uint8_t> memory;
  ucontext_t scheduler;
  int current;
  void (*body)(const void*);
  const void* args;
  bool reversed = false;  // order in which threads run; results must not depend on it
};

Machine& machine();  // one per process, defined in library.cu

[[noreturn]] inline void fail(const char* what) {
  const Cta& c = machine().cta;
  fprintf(stderr, "emulator: %s (CTA %d %d %d, thread %d)\n", what, c.idx.x, c.idx.y, c.idx.z,
          machine().current);
  abort();
}

inline Thread& self() { return machine().threads[machine().current]; }

inline float as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t as_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}

inline float half_value(uint32_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa ? NAN : INFINITY;
  } else if (exponent) {
    x = std::ldexp((float)(1024 + mantissa), exponent - 25);
  } else {
    x = std::ldexp((float)mantissa, -24);
  }
  return h & 0x8000 ? -x : x;
}

inline uint32_t half_bits(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (a == 0) return sign;
  if (a != a) return 0x7FFF;
  if (a >= 65520.0f) return sign | 0x7C00;
  int exponent;
  std::frexp(a, &exponent);                    // a = f 2^exponent, f from 0.5 to 1
  exponent = exponent < -13 ? -13 : exponent;  // subnormals share the least normal's step
  const float steps = std::nearbyint(std::ldexp(a, 11 - exponent));  // to nearest even
  return sign | (uint32_t)((exponent + 13) * 1024 + (int)steps);
}

// Collectives: the operands of 32 lanes are in, their results are written to out.
inline void run_mma(Thread* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 8; ++i) {  // the i-th float16 of A, in registers i / 2
      const int row = (i / 2) % 2 == 0 ? group : group + 8;
      const int k = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][k] = half_value(lanes[lane].in[i / 2] >> (16 * (i & 1)) & 0xFFFF);
    }
    for (int i = 0; i < 4; ++i) {
      const int k = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[k][group] = half_value(lanes[lane].in[4 + i / 2] >> (16 * (i & 1)) & 0xFFFF);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane & 3) * 2 + (i & 1);
      float sum = as_float(lanes[lane].in[6 + i]);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].out[i] = as_bits(sum);
    }
  }
}

inline void run_transpose(Thread* lanes) {
  uint16_t x[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) x[lane / 4][lane % 4 * 2 + i] = lanes[lane].in[0] >> (16 * i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    lanes[lane].out[0] = x[column][row] | (uint32_t)x[column + 1][row] << 16;
  }
}

inline void run_collective(Thread* lanes) {
  const Call call = lanes[0].call;
  uint32_t all = 0;
  switch (call) {
    case Call::kMma:
      run_mma(lanes);
      break;
    case Call::kTranspose:
      run_transpose(lanes);
      break;
    case Call::kShuffle:
      for (int i = 0; i < 32; ++i) lanes[i].out[0] = lanes[i ^ lanes[i].in[1]].in[0];
      break;
    case Call::kAny:
      for (int i = 0; i < 32; ++i) all |= lanes[i].in[0];
      for (int i = 0; i < 32; ++i) lanes[i].out[0] = all;
      break;
    default:
      break;
  }
  for (int i = 0; i < 32; ++i) lanes[i].call = Call::kRunning;
}

// Waits in a collective or at a barrier until everyone concerned has come.
inline void wait(Call call) {
  Thread& thread = self();
  thread.call = call;
  swapcontext(&thread.context, &machine().scheduler);
}

inline void enter() {
  machine().body(machine().args);
  self().call = Call::kDone;
  setcontext(&machine().scheduler);
}

inline void run_cta() {
  Machine& m = machine();
  const int n = m.cta.num_threads;
  for (int i = 0; i < n; ++i) {
    Thread& thread = m.threads[i];
    thread.call = Call::kRunning;
    thread.groups.clear();
    thread.open.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = m.stacks.data() + i * kStack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (;;) {
    bool progress = false;
    for (int i = 0; i < n; ++i) {
      m.current = m.reversed ? n - 1 - i : i;
      if (self().call != Call::kRunning) continue;
      progress = true;
      swapcontext(&m.scheduler, &self().context);
    }
    int done = 0, at_barrier = 0;
    for (int w = 0; w < n; w += 32) {
      Thread* lanes = &m.threads[w];
      for (int i = 0; i < 32; ++i) {
        m.current = w + i;
        if (lanes[i].call != lanes[0].call) fail("lanes of a warp are at different calls");
      }
      if (lanes[0].call == Call::kDone) done += 32;
      if (lanes[0].call == Call::kBarrier) at_barrier += 32;
      if (lanes[0].call >= Call::kWarp) {
        run_collective(lanes);
        progress = true;
      }
    }
    if (done == n) return;
    if (at_barrier == n) {
      for (Thread& thread : m.threads) thread.call = Call::kRunning;
      progress = true;
    }
    if (!progress) fail("deadlock: threads wait at a barrier that others never reach");
  }
}

inline void run_grid(Dim3 grid, int num_threads, size_t shared_bytes, void (*body)(const void*),
                     const void* args) {
  Machine& m = machine();
  if (num_threads % 32) fail("CTAs must be whole warps");
  m.threads.resize(num_threads);
  m.stacks.resize(num_threads * kStack);
  m.memory.resize(shared_bytes + 2 * kGuard + 128);
  uint8_t* begin = m.memory.data() + kGuard;
  begin += -(uintptr_t)begin & 127;
  m.body = body;
  m.args = args;
  m.cta = {{0, 0, 0}, grid, num_threads, begin};
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; ++x) {
        memset(m.memory.data(), 0xFF, m.memory.size());
        m.cta.idx = {x, y, z};
        run_cta();
        for (uint8_t* p = m.memory.data(); p < m.memory.data() + m.memory.size(); ++p) {
          if ((p < begin || p >= begin + shared_bytes) && *p != 0xFF)
            fail("a write beyond the shared memory of the launch");
        }
      }
    }
  }
}

}  // namespace emulator

FQ_DEVICE int thread_idx() { return emulator::machine().current; }
FQ_DEVICE int num_threads() { return emulator::machine().cta.num_threads; }
FQ_DEVICE Dim3 cta_idx() { return emulator::machine().cta.idx; }
FQ_DEVICE Dim3 num_ctas() { return emulator::machine().cta.grid; }
FQ_DEVICE uint8_t* shared_memory() { return emulator::machine().cta.shared; }
FQ_DEVICE void sync_cta() { emulator::wait(emulator::Call::kBarrier); }
FQ_DEVICE void sync_warp() { emulator::wait(emulator::Call::kWarp); }

FQ_DEVICE float shuffle_xor(float x, int mask) {
  emulator::self().in[0] = emulator::as_bits(x);
  emulator::self().in[1] = (uint32_t)mask;
  emulator::wait(emulator::Call::kShuffle);
  return emulator::as_float(emulator::self().out[0]);
}
FQ_DEVICE bool any(bool x) {
  emulator::self().in[0] = x;
  emulator::wait(emulator::Call::kAny);
  return emulator::self().out[0] != 0;
}
FQ_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                   uint32_t b1) {
  const uint32_t operands[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(emulator::self().in, operands, 24);
  memcpy(emulator::self().in + 6, c, 16);
  emulator::wait(emulator::Call::kMma);
  memcpy(c, emulator::self().out, 16);
}
FQ_DEVICE uint32_t transpose(uint32_t x) {
  emulator::self().in[0] = x;
  emulator::wait(emulator::Call::kTranspose);
  return emulator::self().out[0];
}

FQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
FQ_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, uint32_t shift) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}

FQ_DEVICE float exp2_fast(float x) { return std::exp2(x); }
FQ_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
FQ_DEVICE float square_root(float x) { return std::sqrt(x); }
FQ_DEVICE float maximum(float a, float b) { return std::fmax(a, b); }
FQ_DEVICE float minimum(float a, float b) { return std::fmin(a, b); }
FQ_DEVICE float absolute(float x) { return std::fabs(x); }
FQ_DEVICE uint32_t to_half2(float low, float high) {
  return emulator::half_bits(low) | emulator::half_bits(high) << 16;
}
FQ_DEVICE float from_half(uint16_t x) { return emulator::half_value(x); }
FQ_DEVICE float bits_to_float(uint32_t x) { return emulator::as_float(x); }
FQ_DEVICE uint32_t float_to_bits(float x) { return emulator::as_bits(x); }

FQ_DEVICE void copy_async(void* shared, const void* global) {
  if (((uintptr_t)shared | (uintptr_t)global) % 16) emulator::fail("a copy that is not aligned");
  emulator::self().open.push_back({shared, global});
}
FQ_DEVICE void commit_copies() {
  emulator::Thread& thread = emulator::self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kPending>
FQ_DEVICE void wait_copies() {
  auto& groups = emulator::self().groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

FQ_DEVICE int only_here(int x) { return x; }
FQ_DEVICE void atomic_add(int32_t* p, int32_t x) { *p += x; }

template <class T>
FQ_DEVICE T load_as(const void* p) {
  if ((uintptr_t)p % sizeof(T)) emulator::fail("a load that is not aligned");
  T x;
  memcpy(&x, p, sizeof(T));
  return x;
}
FQ_DEVICE Pair load_pair(const void* p) { return load_as<Pair>(p); }
FQ_DEVICE Quad load_quad(const void* p) { return load_as<Quad>(p); }
FQ_DEVICE void store_quad(void* p, Quad v) {
  if ((uintptr_t)p % 16) emulator::fail("a store that is not aligned");
  memcpy(p, &v, sizeof(v));
}

}  // namespace fq
