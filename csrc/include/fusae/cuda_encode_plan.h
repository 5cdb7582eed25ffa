// SPDX-License-Identifier: Apache-2.0
// How the encoders are launched: plain functions of sizes, without CUDA, so that the host can test them.
#pragma once
#include <cstdint>

#include "fusae/cuda_plan.h"

namespace fusae::cuda {

// Persistent clusters of the Hopper GEMM: two blocks of 128 rows each, one where there are no more rows than that.
struct HopperPlan {
  int cluster;       // blocks
  int64_t clusters;
};
inline HopperPlan hopper_plan(int64_t n, int64_t columns, int processors) {
  const int cluster = n > 128 && processors >= 2 ? 2 : 1;
  const int64_t tiles = cdiv(n, 128 * cluster) * cdiv(columns, 256), most = processors / cluster;
  return {cluster, tiles < most ? tiles : most};
}

// Persistent blocks of the portable GEMM: two on every multiprocessor.
inline int64_t portable_blocks(int64_t n, int64_t columns, int processors) {
  const int64_t tiles = cdiv(n, 128) * cdiv(columns, 128), most = 2 * static_cast<int64_t>(processors);
  return tiles < most ? tiles : most;
}

}  // namespace fusae::cuda
