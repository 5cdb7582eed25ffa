// SPDX-License-Identifier: Apache-2.0
// Weighted sums of gathered rows: a block stages what it will gather in shared memory, every thread adds up its columns.
#pragma once
#include "cuda/common.cuh"

namespace fusae::cuda {

constexpr int STAGE = 128;  // entries staged together
constexpr int FLIGHT = 8;   // rows of which a thread has loads under way

// Coefficients and rows. Where a coefficient is 0 the row adds nothing, whatever it holds.
template <class T>
struct Stage {
  float coef[STAGE];
  const T* row[STAGE];
};

struct Range {
  int64_t first, last;
};

// The stored entries of a row. Offsets that lead outside the storage give none there.
__device__ inline Range entries_of(const Entries& a, int64_t row) {
  if (!a.codes.offsets) return {row * a.codes.width, (row + 1) * a.codes.width};
  const int64_t first = a.codes.offsets[row], last = a.codes.offsets[row + 1];
  return {first < 0 ? 0 : first, last < a.storage ? last : a.storage};
}

// The group of an entry: the prefixes, the last one left out, that are at most its latent, or its place in the row.
__device__ inline int group_of(const Groups& groups, int32_t latent, int64_t rank) {
  const int64_t key = groups.by_rank ? rank : latent;
  int low = 0, high = groups.count - 1;
  while (low < high) {
    const int mid = (low + high) / 2;
    if (groups.prefixes[mid] <= key) low = mid + 1; else high = mid;
  }
  return low;
}

// The coefficient, and the row of the latent. There is no row of a latent outside the dictionary: NaN.
template <class T>
__device__ inline void stage_entry(Stage<T>& stage, int place, const Entries& a, int64_t e, const T* weight, int64_t d) {
  const int32_t latent = a.codes.indices[e];
  const bool inside = latent >= 0 && latent < a.m;
  stage.coef[place] = inside ? get(a.codes.values, a.codes.dtype, e) : __int_as_float(0x7fc00000);
  stage.row[place] = weight + (inside ? latent : 0) * d;
}


// acc += Σ coef * row[column ...] of the staged entries [from, to), in order. Every load is made, that of a coefficient
// of 0 from the row `other`, which is in cache: loads behind branches would wait for each other.
template <class T, int V>
__device__ inline void add_rows(float (&acc)[V], const Stage<T>& stage, int from, int to, const T* other, int64_t column) {
  for (int e = from; e < to; e += FLIGHT) {
    Pack<T, V> rows[FLIGHT];
    float coef[FLIGHT];
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) {
      const int place = e + u < to ? e + u : to - 1;
      coef[u] = e + u < to ? stage.coef[place] : 0.0f;
      rows[u] = load<T, V>((coef[u] != 0.0f ? stage.row[place] : other) + column);
    }
#pragma unroll
    for (int u = 0; u < FLIGHT; ++u) {
      if (coef[u] == 0.0f) continue;  // whatever `other` holds
#pragma unroll
      for (int i = 0; i < V; ++i) acc[i] = fmaf(coef[u], to_float(rows[u].item[i]), acc[i]);
    }
  }
}

}  // namespace fusae::cuda
