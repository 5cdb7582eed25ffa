// SPDX-License-Identifier: Apache-2.0
// Rows that their candidates could not certify, exactly and on the device's own account.
//
// The list of rows and its length stay on the device. Blocks of 128 listed rows and ranges of columns are the units of
// work; the fewer blocks there are, the more ranges each is cut into. A unit goes through its columns in order: what
// reaches the row's bound is appended, and a buffer that may be full after the next tile is cut back to its k best,
// which raises the bound. `repair_merge` joins the ranges. With an empty list both return at once.
#pragma once
#include "cuda/encode_portable.cuh"
#include "cuda/encode_select.cuh"

namespace fusae::cuda {
namespace portable {

struct RepairShared {
  Shared gemm;
  Exchange exchange;
  uint64_t bound[ROWS];
  int count[ROWS];
};

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    repair_scan(const __grid_constant__ EncodeInput in, const __grid_constant__ Selection s) {
  const int64_t failed = *s.failed, blocks = (failed + ROWS - 1) / ROWS;
  if (failed == 0) return;
  RepairShared& shared = *reinterpret_cast<RepairShared*>(shared_memory());
  const Frame frame = frame_of(shared.gemm);
  const Scoring scoring{in.norms, in.magnitude};
  Block block{&shared.exchange, THREADS, 0};
  const int64_t tiles_n = (in.m + COLUMNS - 1) / COLUMNS, splits = repair_splits(s.units, blocks, s.splits);
  const int64_t each = (tiles_n + splits - 1) / splits;
  float acc[4][4][4];
  for (int64_t unit = blockIdx.x; unit < blocks * splits; unit += gridDim.x) {
    const int64_t place0 = unit / splits * ROWS, first = unit % splits * each;
    const int64_t end = first + each < tiles_n ? first + each : tiles_n;
    Entry* const buffers = s.repair + unit * ROWS * s.repair_cap;
    if (frame.thread < ROWS) {
      shared.bound[frame.thread] = 0;
      shared.count[frame.thread] = 0;
    }
    for (int64_t tile = first; tile < end; ++tile) {
      const int64_t column0 = tile * COLUMNS;
      stage_columns(frame, 0, in, column0, nullptr, s.mask);
      const Sources from = sources_of(
          in, sizeof(T), [&](int r) -> int64_t { return place0 + r < failed ? s.list[place0 + r] : -1; },
          [&](int c) { return column0 + c < in.m ? column0 + c : -1; });
      tile_products<T>(acc, shared.gemm, from, in.x, in.d * static_cast<int64_t>(sizeof(T)));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = frame.column + 8 * j + e;
          const float bias = frame.shared->bias[0][c], scale = frame.shared->scale[0][c];
          const bool valid = column0 + c < in.m && (!s.mask || frame.shared->third[0][c] != 0.0f);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int r = frame.row + 16 * i + 8 * h;
              const float pre = acc[i][j][2 * h + e] + bias;
              const int32_t latent = static_cast<int32_t>(column0 + c);
              if (valid && place0 + r < failed && key_of(score_of(pre, scale, in.magnitude), latent) >= shared.bound[r])
                buffers[r * s.repair_cap + atomicAdd(&shared.count[r], 1)] = entry_of(pre, latent);
            }
          }
        }
      }
      __syncthreads();
      // Rows that may not hold the next tile; at the end of the range, all that hold more than k.
      const int64_t most = tile + 1 == end ? s.k : s.repair_cap - COLUMNS;
      for (int r = 0; r < ROWS; ++r) {
        const int64_t count = shared.count[r];
        if (count <= most || count <= s.k) continue;  // the same for all threads
        Entry* const entries = buffers + r * s.repair_cap;
        const uint64_t bound = entries_bound(block, entries, count, s.k, scoring);
        const int64_t left = cut(block, entries, count, bound, scoring);
        if (frame.thread == 0) {
          shared.bound[r] = bound;
          shared.count[r] = static_cast<int>(left);
        }
      }
      __syncthreads();
    }
    if (frame.thread < ROWS) s.repair_count[unit * ROWS + frame.thread] = shared.count[frame.thread];
    __syncthreads();
  }
}

constexpr int MERGED = 4096;  // entries that a merge holds in shared memory

// The k best of all ranges of a listed row, sorted, as its codes. With one range and a k that shared memory does not
// hold, in the row's buffer.
template <class T>
__global__ void __launch_bounds__(THREADS) repair_merge(EncodeInput in, Selection s, bool relu) {
  const int64_t failed = *s.failed, blocks = (failed + ROWS - 1) / ROWS;
  unsigned char* const memory = shared_memory();
  Block block{reinterpret_cast<Exchange*>(memory), THREADS, 0};
  const Scoring scoring{in.norms, in.magnitude};
  const int64_t splits = repair_splits(s.units, blocks, s.splits);
  for (int64_t place = blockIdx.x; place < failed; place += gridDim.x) {
    const int64_t unit = place / ROWS * splits, r = place % ROWS, row = s.list[place];
    Entry* entries = s.repair + (unit * ROWS + r) * s.repair_cap;
    int64_t count = s.repair_count[unit * ROWS + r];
    if (s.k <= MERGED) {
      Entry* const merged = reinterpret_cast<Entry*>(memory + sizeof(Exchange));
      count = 0;
      for (int64_t split = 0; split < splits; ++split) {  // splits * k <= MERGED unless splits is 1
        const Entry* const from = s.repair + ((unit + split) * ROWS + r) * s.repair_cap;
        const int64_t some = s.repair_count[(unit + split) * ROWS + r];
        for (int64_t i = threadIdx.x; i < some; i += THREADS) merged[count + i] = from[i];
        count += some;
      }
      entries = merged;
      __syncthreads();
      if (count > s.k) count = cut(block, entries, count, entries_bound(block, entries, count, s.k, scoring), scoring);
    }
    sort_entries(block, entries, count, power_of_2(count), scoring);
    write_codes<T>(entries, count, row, s, relu);
    __syncthreads();
  }
}

}  // namespace portable
}  // namespace fusae::cuda
