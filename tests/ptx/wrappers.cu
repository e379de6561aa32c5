// SPDX-License-Identifier: Apache-2.0
// Every function of warp.h in a kernel of its own, for nvcc and for the emulator.
//
// A case reads kWordsIn words of its thread and writes kWordsOut. Shared memory is kBytes.
#include "cuda/launch.h"

namespace fq {

constexpr int kThreads = 64, kWordsIn = 12, kWordsOut = 4, kBytes = 4096;

struct WrapperArgs {
  const uint32_t* in;
  uint32_t* out;
  int32_t* count;
};

#define CASE(name)                                                          \
  struct name {                                                             \
    FQ_DEVICE static void run(const uint32_t* in, uint32_t* out, int32_t*); \
  };                                                                        \
  FQ_DEVICE void name::run(const uint32_t* in, uint32_t* out, [[maybe_unused]] int32_t* count)

CASE(Threads) {
  out[0] = thread_idx() | num_threads() << 8;
  out[1] = cta_idx().x | cta_idx().y << 8 | cta_idx().z << 16;
  out[2] = num_ctas().x | num_ctas().y << 8 | num_ctas().z << 16;
  out[3] = lane_idx() | warp_idx() << 8 | only_here((int)in[0]) << 16;
}
CASE(Shuffle) {
  out[0] = float_to_bits(shuffle_xor(bits_to_float(in[0]), 1));
  out[1] = float_to_bits(shuffle_xor(bits_to_float(in[0]), 8));
  out[2] = float_to_bits(shuffle_xor(bits_to_float(in[0]), 16));
  out[3] = any(in[0] % 61 == 0) | any(false) << 1;
}
CASE(Sums) {
  out[0] = float_to_bits(warp_sum((float)(in[0] & 1023)));
  out[1] = float_to_bits(warp_max((float)(in[1] & 1023)));
}
CASE(Mma) {
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = (float)(in[8 + i] & 255);
  uint32_t x[6];  // small integers, so that no order of additions rounds
  for (int i = 0; i < 6; ++i) x[i] = to_half2((float)(in[i] & 31), -(float)(in[i] >> 8 & 31));
  mma(c, x[0], x[1], x[2], x[3], x[4], x[5]);
  for (int i = 0; i < 4; ++i) out[i] = float_to_bits(c[i]);
}
CASE(Transpose) { out[0] = transpose(in[0]); }
CASE(Bytes) {
  out[0] = permute_bytes(in[0], in[1], in[2] & 0x7777);
  out[1] = permute_bytes(in[0], in[1], 0x5410);
  out[2] = shift_right(in[0], in[1], in[2] & 31);
  out[3] = permute_bytes(in[0], in[1], 0x7632);
}
CASE(Floats) {  // approximate ones are compared with a tolerance
  const float x = bits_to_float((in[0] & 0x7FFFFF) | 0x3F800000);  // from 1 to 2
  out[0] = float_to_bits(exp2_fast(16.0f * x - 24.0f));
  out[1] = float_to_bits(reciprocal_fast(x));
}
CASE(ExactFloats) {
  const uint32_t quiet = 0x400000;  // C's fmax does not pass over signalling NaN
  const float a = bits_to_float(in[0] | quiet), b = bits_to_float(in[1] | quiet);
  out[0] = float_to_bits(a == a ? square_root(absolute(a)) : 0.0f);
  out[1] = float_to_bits(maximum(a, b) == maximum(a, b) ? maximum(a, b) : 0.0f);
  out[2] = float_to_bits(minimum(a, bits_to_float(0x7FC00000)) == a);
  out[3] = float_to_bits(a == a && b == b ? minimum(absolute(a), absolute(b)) : 1.0f);
}
CASE(Halves) {
  const float a = bits_to_float((in[0] & 0x81FFFFFF) | 0x34000000);  // 2^-23 to 2^-19: subnormals
  const float b = bits_to_float((in[1] & 0x87FFFFFF) | 0x40000000);  // 2 to 2^17: overflows
  out[0] = to_half2(a, b);
  out[1] = float_to_bits(from_half((uint16_t)(in[2] & 0xFBFF)));
  out[2] = float_to_bits(from_half((uint16_t)(in[2] >> 16 & 0x83FF)));
}
CASE(Elements) {
  for (int dtype = 0; dtype < 3; ++dtype) {
    const float x = load_element(in, dtype ? 2 : 1, dtype);
    store_element(out, dtype == 2 ? 3 : dtype, dtype, x == x ? x : 1.0f);
  }
  out[3] = 0;
}
CASE(Loads) {
  const Pair pair = load_pair(in);
  const Quad quad = load_quad(in + 4);
  float x[4], y[2], z[1];
  load_floats(reinterpret_cast<const float*>(in), x);
  load_floats(reinterpret_cast<const float*>(in + 4), y);
  load_floats(reinterpret_cast<const float*>(in + 9), z);
  store_quad(out, {pair.x ^ quad.x, pair.y ^ quad.y, float_to_bits(x[2]) ^ float_to_bits(y[1]),
                   float_to_bits(z[0]) ^ load_as<uint16_t>(in + 10)});
}
CASE(Copies) {  // two groups, of which only the first is waited for before it is read
  uint8_t* own = shared_memory() + thread_idx() * 32;
  copy_async(own, in);
  commit_copies();
  copy_async(own + 16, in + 4);
  commit_copies();
  wait_copies<1>();
  sync_warp();
  const uint32_t* other =
      reinterpret_cast<const uint32_t*>(shared_memory()) + (thread_idx() ^ 1) * 8;
  out[0] = other[0];
  out[1] = other[3];
  wait_copies<0>();
  sync_cta();
  other = reinterpret_cast<const uint32_t*>(shared_memory()) + (thread_idx() ^ 33) * 8;
  out[2] = other[4];
  out[3] = other[7];
}
CASE(Atomics) {
  atomic_add(count, (int)(in[0] & 3));
  out[0] = 1;
}

template <class Case>
FQ_KERNEL(kThreads, 1)
wrapper(FQ_PARAM WrapperArgs args) {
  const int cta = cta_idx().x + num_ctas().x * (cta_idx().y + num_ctas().y * cta_idx().z);
  const int64_t thread = cta * num_threads() + thread_idx();
  Case::run(args.in + thread * kWordsIn, args.out + thread * kWordsOut, args.count);
}

// clang-format off
#define FQ_CASES(X)                                                                   \
  X(Threads) X(Shuffle) X(Sums) X(Mma) X(Transpose) X(Bytes) X(Floats) X(ExactFloats) \
  X(Halves) X(Elements) X(Loads) X(Copies) X(Atomics)
// clang-format on

#ifndef __CUDACC__
emulator::Machine& emulator::machine() {
  static Machine only;
  return only;
}
#endif

}  // namespace fq

// Runs case number `which` in 2 x 1 x 3 CTAs.
extern "C" int run_wrapper(int which, const uint32_t* in, uint32_t* out, int32_t* count) {
  const fq::WrapperArgs args = {in, out, count};
  const fq::Grid grid = {2, 1, 3, fq::kThreads, fq::kBytes};
  int number = 0;
#define FQ_RUN(name) \
  if (which == number++) return fq::launch<&fq::wrapper<fq::name>>(grid, nullptr, args);
  FQ_CASES(FQ_RUN)
#undef FQ_RUN
  return -1;
}
