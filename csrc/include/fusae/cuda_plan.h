// SPDX-License-Identifier: Apache-2.0
// How work is cut into blocks of threads: plain functions of sizes, without CUDA, so that the host can test them.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FUSAE_BOTH __host__ __device__
#else
#define FUSAE_BOTH
#endif

namespace fusae::cuda {

FUSAE_BOTH inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Bits that tell m latents and one number above them apart.
inline int key_bits(int64_t m) {
  int bits = 1;
  while (m >> bits) ++bits;
  return bits;
}

// What a row of decode_loss keeps in shared memory: the residuals of all groups where half of the limit holds them (two
// blocks at least share a multiprocessor), and the gathered rows too where there is room for a whole row of codes.
struct LossPlan {
  bool near;
  int cached;  // rows
  int64_t bytes;
};
inline LossPlan loss_plan(int64_t d, int64_t groups, int64_t width, int64_t item, bool keep, bool dots, int64_t staged,
                          int64_t limit) {
  const int64_t room = limit / 2 - 12 * 1024;  // the rest is static shared memory
  const int64_t residuals = keep ? groups * d * 4 : 0;
  if (residuals > room) return {false, 0, 0};
  const int64_t rows = width * d * item;
  const bool cache = dots && width > 0 && width <= staged && (groups * d * 4) % 16 == 0 && residuals + rows <= room;
  return {keep, cache ? static_cast<int>(width) : 0, residuals + (cache ? rows : 0)};
}

// Row-wise top-k in one pass: keys in a buffer that is cut back to k when the next `block` might not fit.
struct TopkPlan {
  int capacity;
  int sorted;  // k, up to a power of two: what the last sort works on
};
inline TopkPlan topk_plan(int64_t k, int64_t block) {
  int sorted = 1;
  while (sorted < k) sorted *= 2;
  return {static_cast<int>(sorted + block + (k > 1024 ? k : 1024)), sorted};
}

}  // namespace fusae::cuda
