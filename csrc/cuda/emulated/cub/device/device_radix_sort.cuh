// SPDX-License-Identifier: Apache-2.0
// CUB's sort of pairs by some bits of their keys, on a CPU.
#pragma once
#include <cuda_runtime.h>

#include <numeric>

namespace cub {

struct DeviceRadixSort {
  template <class K, class V>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, const K* keys, K* sorted, const V* values, V* order,
                               int64_t n, int begin_bit, int end_bit, cudaStream_t = nullptr) {
    if (!scratch) return bytes = 1, cudaSuccess;
    const K mask = static_cast<K>(((uint64_t{1} << (end_bit - begin_bit)) - 1) << begin_bit);
    std::vector<int64_t> place(static_cast<size_t>(n));
    std::iota(place.begin(), place.end(), int64_t{0});
    std::stable_sort(place.begin(), place.end(), [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (int64_t i = 0; i < n; ++i) {
      sorted[i] = keys[place[static_cast<size_t>(i)]];
      order[i] = values[place[static_cast<size_t>(i)]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
