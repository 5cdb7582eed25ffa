// SPDX-License-Identifier: Apache-2.0
// How work is cut into blocks of threads: plain functions of sizes, without CUDA, so that the host can test them.
#pragma once
#include <cstdint>

namespace fusae::cuda {

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t MAX_GRID_X = 2147483647, MAX_GRID_Y = 65535;

// Elements of one 16-byte access where rows of d elements at `address` start at multiples of 16 bytes, else 1.
inline int vector_width(int64_t d, int item_bytes, uintptr_t addresses) {
  const int width = 16 / item_bytes;
  return d % width == 0 && addresses % 16 == 0 ? width : 1;
}

// Gathers of whole rows: one thread for every vector of columns, at most 256 threads a block, the rest in blocks of
// columns. (Blocks run column by column: such a part of the gathered matrix is nearer to the size of L2.)
struct GatherPlan {
  int threads;
  int64_t column_blocks;
};
inline GatherPlan gather_plan(int64_t d, int vector) {
  const int64_t vectors = cdiv(d, vector), blocks = cdiv(vectors, 256);
  return {static_cast<int>(cdiv(cdiv(vectors, blocks < 1 ? 1 : blocks), 32) * 32), blocks};
}

}  // namespace fusae::cuda
