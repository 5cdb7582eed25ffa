// SPDX-License-Identifier: Apache-2.0
// Selection of unique 64-bit keys by a block of threads. A key is an ordered score above an inverted index: the larger
// score first, then the lower index. Keys differ, so no result depends on the order in which they arrived.
#pragma once
#include "cuda/common.cuh"

namespace fusae::cuda {

using Key = unsigned long long;

// Order-preserving bits of a score: NaN highest, -0 as +0.
__device__ inline uint32_t ordered(float score) {
  const uint32_t u = __float_as_uint(score + 0.0f);
  return score != score ? 0xffffffffu : ((u & 0x80000000u) ? ~u : (u | 0x80000000u));
}
__device__ inline Key key_of(float score, int64_t index) {
  return (static_cast<Key>(ordered(score)) << 32) | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
__device__ inline int32_t index_of(Key key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

struct RadixScratch {
  int histogram[256];
  int digit, want, inside;
};

// Of the digits counted in the histogram, the one that the want-th largest has; how many of it are wanted, and how many
// there are. By the first warp.
__device__ inline void find_digit(RadixScratch& s, int want) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return;
  int own = 0;  // lane 0 has the eight highest digits
  for (int i = 0; i < 8; ++i) own += s.histogram[255 - lane * 8 - i];
  int before = own;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(FULL, before, static_cast<unsigned>(step));
    if (lane >= step) before += other;
  }
  before -= own;
  if (before >= want || before + own < want) return;
  for (int i = 0; i < 8; ++i) {
    const int digit = 255 - lane * 8 - i, here = s.histogram[digit];
    if (before + here >= want) {
      s.digit = digit;
      s.want = want - before;
      s.inside = here;
      return;
    }
    before += here;
  }
}

// A number that exactly `want` of the keys are not below, 1 <= want <= number of keys. `visit` calls its argument with
// every key of this thread. All threads of a block come here; what they wrote to shared memory before is seen.
template <class Visit>
__device__ inline Key bound_of(RadixScratch& s, int want, Visit visit) {
  Key prefix = 0, mask = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) s.histogram[i] = 0;
    __syncthreads();
    visit([&](Key key) {
      if ((key & mask) == prefix) atomicAdd(&s.histogram[(key >> shift) & 255], 1);
    });
    __syncthreads();
    find_digit(s, want);
    __syncthreads();
    prefix |= static_cast<Key>(s.digit) << shift;
    mask |= static_cast<Key>(255) << shift;
    want = s.want;
    if (s.inside == want) break;
  }
  return prefix;
}

// Moves the keys of [0, count) that are not below `bound` to the front. `kept` is shared and their number afterwards.
__device__ inline void compact(Key* keys, int count, Key bound, int& kept) {
  __syncthreads();
  if (threadIdx.x == 0) kept = 0;
  for (int base = 0; base < count; base += static_cast<int>(blockDim.x)) {
    const int i = base + static_cast<int>(threadIdx.x);
    const Key key = i < count ? keys[i] : 0;
    __syncthreads();  // all keys up to here were read, and no more than that will be written
    if (i < count && key >= bound) keys[atomicAdd(&kept, 1)] = key;
  }
  __syncthreads();
}

// Sorts `size` keys, a power of two, largest first.
__device__ inline void sort_descending(Key* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += static_cast<int>(blockDim.x)) {
        const int i = 2 * step * (pair / step) + pair % step, j = i + step;
        const Key a = keys[i], b = keys[j];
        const bool descending = (i & run) == 0;
        if ((a < b) == descending) {
          keys[i] = b;
          keys[j] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace fusae::cuda
