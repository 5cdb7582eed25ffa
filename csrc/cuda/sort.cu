// SPDX-License-Identifier: Apache-2.0
// CUB's stable radix sort of (latent, entry), a file of its own because it takes long to compile.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/common.cuh"

namespace fusae::cuda {

size_t sort_scratch(int64_t storage, int64_t m) {
  const Shape shape = {{"entries", storage}, {"m", m}};
  size_t bytes = 0;
  check("sort by latent", shape,
        cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                        static_cast<uint32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                        static_cast<int32_t*>(nullptr), storage, 0, key_bits(m)));
  return bytes;
}

void radix_sort(const SortArgs& a, int bits, Stream stream) {
  const Shape shape = {{"entries", a.entries.storage}, {"m", a.entries.m}};
  size_t bytes = a.scratch_bytes;
  check("sort by latent", shape,
        cub::DeviceRadixSort::SortPairs(a.scratch, bytes, static_cast<const uint32_t*>(a.keys), a.sorted,
                                        static_cast<const int32_t*>(a.place), a.order, a.entries.storage, 0, bits,
                                        static_cast<cudaStream_t>(stream)));
}

}  // namespace fusae::cuda
