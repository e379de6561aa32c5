// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for one instruction set: compiled once each for FQ_ISA = portable, avx2, avx512,
// avx512_vnni.
#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/encode.h"
#include "cpu/latent.h"

namespace fq::FQ_ISA {
extern const Kernels kernels;
const Kernels kernels = {encode_kv, plan_attention, paged_attention, encode_latents,
                         attend_latents};
}  // namespace fq::FQ_ISA
