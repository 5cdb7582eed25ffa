// SPDX-License-Identifier: Apache-2.0
// One plain-data argument struct per CUDA op, and the functions that launch it. Pointers are device memory, matrices
// row-major and contiguous; every call enqueues on `stream` and returns. A failed launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "fusae/ops.h"

namespace fusae::cuda {

using Stream = void*;  // cudaStream_t, without its header

// Codes whose contents no one has looked at: a look would wait for the device. Kernels leave out what lies past the
// storage, and a latent outside the dictionary makes what it touches NaN.
struct Entries {
  Codes codes;
  int64_t storage;  // entries that there is memory for
  int64_t m;        // latents
};

struct DecodeArgs {
  Entries entries;
  const void* weight;  // [m, d]
  const void* bias;    // [d] or null
  void* out;           // [n, d]
  DType dtype;         // of weight, bias, out
  int64_t d;
};

void decode(const DecodeArgs& args, Stream stream);

}  // namespace fusae::cuda
