// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, as library.cpp chooses among them.
#pragma once

#include "cpu/latent_params.h"
#include "cpu/params.h"

namespace fq {

struct Kernels {
  int64_t (*encode_kv)(const FqCodec&, const FqPages&, const FqEncode&);
  int64_t (*plan)(const FqCodec&, const FqPages&, const FqAttend&, void*);
  int (*paged_attention)(const FqCodec&, const FqPages&, const FqAttend&);
  int64_t (*encode_latents)(const FqCodec&, const FqPages&, const FqEncodeLatents&);
  int (*attend_latents)(const FqCodec&, const FqPages&, const FqAttendLatents&);
};

}  // namespace fq
