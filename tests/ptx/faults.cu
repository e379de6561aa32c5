// SPDX-License-Identifier: Apache-2.0
// Small kernels with one mistake each, and how they would be right. PTX only: most of these
// mistakes the emulator cannot see.
#include "cuda/warp.h"

namespace fq {

struct FaultArgs {
  uint32_t* data;  // [64 * 4]
  int bad;         // 1: with the mistake
};

FQ_DEVICE uint32_t* words() { return reinterpret_cast<uint32_t*>(shared_memory()); }

#define CASE(name) extern "C" __global__ void name(FQ_PARAM FaultArgs args)

CASE(no_cta_barrier) {
  words()[thread_idx()] = 1;
  if (!args.bad) sync_cta();
  args.data[thread_idx()] = words()[thread_idx() ^ 32];
}
CASE(only_a_warp_barrier) {
  words()[thread_idx()] = 1;
  if (args.bad) {
    sync_warp();
  } else {
    sync_cta();
  }
  args.data[thread_idx()] = words()[thread_idx() ^ 32];
}
CASE(no_warp_barrier) {
  words()[thread_idx()] = 1;
  if (!args.bad) sync_warp();
  args.data[thread_idx()] = words()[thread_idx() ^ 1];
}
CASE(shuffle_is_no_barrier) {
  words()[thread_idx()] = 1;
  const float x = shuffle_xor(1.0f, 1);
  if (!args.bad) sync_warp();
  args.data[thread_idx()] = words()[thread_idx() ^ 1] + float_to_bits(x);
}
CASE(written_while_read) {
  words()[thread_idx()] = 1;
  sync_cta();
  const uint32_t x = words()[thread_idx() ^ 32];
  if (!args.bad) sync_cta();
  words()[thread_idx()] = x + 1;
  args.data[thread_idx()] = x;
}
CASE(read_by_both_warps) {  // then written by one, which has met only its own lanes
  if (thread_idx() < 4) words()[thread_idx()] = 1;
  sync_cta();
  args.data[thread_idx()] = words()[thread_idx() % 4];
  if (args.bad) {
    sync_warp();
  } else {
    sync_cta();
  }
  if (thread_idx() == 0) words()[0] = 2;
}
CASE(two_writers) {
  words()[args.bad ? thread_idx() / 2 : thread_idx()] = 1;
  args.data[thread_idx()] = 0;
}
CASE(half_a_word) {  // neighbours that share a word, but no byte
  reinterpret_cast<uint16_t*>(words())[args.bad ? thread_idx() & 62 : thread_idx()] = 1;
  sync_cta();
  args.data[thread_idx()] = words()[thread_idx() / 4];
}
CASE(unwritten) {
  if (thread_idx() < 63 || !args.bad) words()[thread_idx()] = 1;
  sync_cta();
  args.data[thread_idx()] = words()[63 - thread_idx()];
}
CASE(beyond_shared) { words()[thread_idx() + (args.bad ? 1024 - 63 : 0)] = 1; }
CASE(beyond_global) { args.data[thread_idx() * 4 + (args.bad ? 4 : 3)] = 1; }
CASE(misaligned) {
  const uint8_t* at = reinterpret_cast<const uint8_t*>(args.data) + (args.bad ? 2 : 4);
  const uint32_t x = load_as<uint32_t>(at);
  args.data[thread_idx() * 4 + 3] = x;
}
CASE(misaligned_quad) {
  if (thread_idx() < 32)
    store_quad(args.data + thread_idx() * 4 + (args.bad ? 2 : 0), {1, 2, 3, 4});
}
CASE(copy_not_waited_for) {
  copy_async(words() + thread_idx() * 4, args.data + thread_idx() * 4);
  commit_copies();
  if (args.bad) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  args.data[thread_idx() * 4] = words()[thread_idx() * 4];
}
CASE(copy_not_shared) {  // waited for by its own thread, which the reader does not know
  copy_async(words() + thread_idx() * 4, args.data + thread_idx() * 4);
  commit_copies();
  wait_copies<0>();
  if (!args.bad) sync_warp();
  args.data[thread_idx() * 4] = words()[(thread_idx() ^ 1) * 4];
}
CASE(copy_not_committed) {
  copy_async(words() + thread_idx() * 4, args.data + thread_idx() * 4);
  if (!args.bad) commit_copies();
  wait_copies<0>();
  args.data[thread_idx() * 4] = words()[thread_idx() * 4];
}
CASE(copy_over_what_is_read) {
  words()[thread_idx()] = 1;
  sync_cta();
  const uint32_t x = words()[thread_idx() ^ 1];
  if (!args.bad) sync_cta();
  if (thread_idx() < 16) copy_async(words() + thread_idx() * 4, args.data + thread_idx() * 4);
  commit_copies();
  wait_copies<0>();
  args.data[thread_idx() * 4] = x;
}
CASE(copy_left_behind) {
  copy_async(words() + thread_idx() * 4, args.data + thread_idx() * 4);
  commit_copies();
  if (!args.bad) wait_copies<0>();
}
CASE(half_a_warp) {
  float x = 1.0f;
  if (!args.bad || thread_idx() % 32 < 16) x = shuffle_xor(x, 1);
  args.data[thread_idx()] = float_to_bits(x);
}
CASE(half_a_cta) {
  if (!args.bad || thread_idx() < 32) sync_cta();
  args.data[thread_idx()] = 1;
}

}  // namespace fq
