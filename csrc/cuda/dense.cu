// SPDX-License-Identifier: Apache-2.0
// Dense activations to codes and back, and what a step at the thresholds gives the entries.
#include "cuda/gather.cuh"

namespace fusae::cuda {
namespace {

// A bit for every entry that is not 0 (NaN is not), 32 columns a warp at a time, and their number for every row.
__global__ void __launch_bounds__(256) mask_kernel(NonzeroArgs a) {
  __shared__ int parts[32];
  const int64_t row = blockIdx.x, words = cdiv(a.m, 32);
  int count = 0;
  for (int64_t w = threadIdx.x / 32; w < words; w += blockDim.x / 32) {
    const int64_t column = w * 32 + threadIdx.x % 32;
    const bool set = column < a.m && get(a.dense, a.dtype, row * a.stride + column * a.step) != 0.0f;
    const unsigned bits = __ballot_sync(FULL, set);
    if (threadIdx.x % 32 == 0) {
      a.mask[row * words + w] = bits;
      count += __popc(bits);
    }
  }
  count = block_sum(count, parts);
  if (threadIdx.x == 0) a.count[row] = count;
}

__global__ void __launch_bounds__(256) take_kernel(NonzeroArgs a) {
  __shared__ int parts[8];
  const int64_t row = blockIdx.x, words = cdiv(a.m, 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int64_t base = a.offsets[row];
  for (int64_t first = 0; first < words; first += blockDim.x) {
    const int64_t w = first + threadIdx.x;
    uint32_t bits = w < words ? a.mask[row * words + w] : 0;
    const int own = __popc(bits);
    int before = own;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(FULL, before, static_cast<unsigned>(step));
      if (lane >= step) before += other;
    }
    __syncthreads();
    if (lane == 31) parts[warp] = before;
    __syncthreads();
    int64_t at = base + before - own;
    for (int i = 0; i < 8; ++i) {
      if (i < warp) at += parts[i];
      base += parts[i];
    }
    for (; bits && at < a.capacity; bits &= bits - 1, ++at) {
      const int64_t column = w * 32 + __ffs(static_cast<int>(bits)) - 1;
      a.indices[at] = static_cast<int32_t>(column);
      put(a.values, a.dtype, at, get(a.dense, a.dtype, row * a.stride + column * a.step));
    }
  }
}

// Whether some entries of ragged codes did not fit their storage.
__device__ inline bool incomplete(const Entries& a) { return a.codes.offsets && a.codes.offsets[a.codes.n] > a.storage; }

__global__ void __launch_bounds__(128) scatter_kernel(Entries a, void* dense) {
  const int64_t row = blockIdx.x;
  const bool missing = incomplete(a);
  const Range range = entries_of(a, row);
  for (int64_t e = range.first + threadIdx.x; e < range.last; e += blockDim.x) {
    const int32_t latent = a.codes.indices[e];
    const float value = missing ? __int_as_float(0x7fc00000) : get(a.codes.values, a.codes.dtype, e);
    if (latent >= 0 && latent < a.m) put(dense, a.codes.dtype, row * a.m + latent, value);
  }
}

__global__ void __launch_bounds__(128) threshold_kernel(ThresholdArgs a) {
  const int64_t row = blockIdx.x;
  const bool missing = incomplete(a.entries);
  const Range range = entries_of(a.entries, row);
  for (int64_t e = range.first + threadIdx.x; e < range.last; e += blockDim.x) {
    const int32_t latent = a.entries.codes.indices[e];
    const int flags = a.state[e];
    float through = 0.0f, jump = 0.0f;
    if (latent >= 0 && latent < a.entries.m) {
      if (a.entries.codes.values) {
        const float g = get(a.entries.codes.values, a.entries.codes.dtype, e);
        through = flags & 1 ? g : 0.0f;
        jump = a.threshold[latent] * g;
      }
      if (a.grad_l0) jump += a.grad_l0[row];
      jump = flags & 2 ? jump / a.bandwidth : 0.0f;
      if (missing) through = jump = __int_as_float(0x7fc00000);
    }
    a.grad_pre[e] = a.straight_through ? through + jump : through;
    a.jumps[e] = -jump;
  }
}

}  // namespace

void nonzero_mask(const NonzeroArgs& a, Stream stream) {
  launch("codes_from_dense", {{"n", a.n}, {"m", a.m}}, mask_kernel, {a.n, 1, 256}, stream, a);
}

void nonzero_take(const NonzeroArgs& a, Stream stream) {
  launch("codes_from_dense", {{"n", a.n}, {"m", a.m}, {"capacity", a.capacity}}, take_kernel, {a.n, 1, 256}, stream, a);
}

void scatter(const Entries& a, void* dense, Stream stream) {
  launch("scatter", {{"n", a.codes.n}, {"m", a.m}, {"entries", a.storage}}, scatter_kernel, {a.codes.n, 1, 128}, stream, a,
         dense);
}

void threshold_gradients(const ThresholdArgs& a, Stream stream) {
  launch("encode_threshold backward", {{"n", a.entries.codes.n}, {"m", a.entries.m}, {"entries", a.entries.storage}},
         threshold_kernel, {a.entries.codes.n, 1, 128}, stream, a);
}

}  // namespace fusae::cuda
