// SPDX-License-Identifier: Apache-2.0
// Memory that outlives a call: 64-byte aligned, uninitialised, grown on demand, one per thread.
#pragma once

#include <cstddef>

namespace fq {

// Scratch of the calling thread, valid until its next call of the same function.
void* thread_scratch(size_t bytes);
void* call_scratch(size_t bytes);  // for what the threads of one call share

}  // namespace fq
