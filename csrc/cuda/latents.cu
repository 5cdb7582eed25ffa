// SPDX-License-Identifier: Apache-2.0
// Sums by latent: the gradients of weights, biases and thresholds, from entries that a stable sort puts in the order of
// their latents. Nothing is added atomically, and the order of additions depends on the entries alone.
#include "cuda/gather.cuh"

namespace fusae::cuda {
namespace {

__global__ void __launch_bounds__(128) keys_kernel(const __grid_constant__ SortArgs a) {
  const Entries& entries = a.entries;
  const int64_t i = blockIdx.x;
  const Range range = entries_of(entries, i);
  for (int64_t e = range.first + threadIdx.x; e < range.last; e += blockDim.x) {
    const int32_t latent = entries.codes.indices[e];
    const bool counts = latent >= 0 && latent < entries.m && get(entries.codes.values, entries.codes.dtype, e) != 0.0f;
    const int64_t group = a.groups.count > 1 ? group_of(a.groups, latent, e - range.first) : 0;
    if (counts) a.keys[e] = static_cast<uint32_t>(latent);
    a.row[e] = i + group * entries.codes.n;
  }
}

// The first of the n sorted numbers that is not below `wanted`.
template <class N, class W>
__device__ inline int64_t lower_bound(const N* sorted, int64_t n, W wanted) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (sorted[mid] < wanted) low = mid + 1; else high = mid;
  }
  return low;
}

__global__ void __launch_bounds__(256) start_kernel(SortArgs a) {
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (latent <= a.entries.m) a.start[latent] = lower_bound(a.sorted, a.entries.storage, static_cast<uint32_t>(latent));
}

// acc = Σ coef * source row over the sorted entries [first, last). All threads of a block come here.
template <class T, int V>
__device__ inline void sum_entries(float (&acc)[V], Stage<T>& stage, const SumsArgs& a, int64_t first, int64_t last,
                                   int64_t column) {
  const T* source = static_cast<const T*>(a.source);
  for (; first < last; first += STAGE) {
    const int count = static_cast<int>(last - first < STAGE ? last - first : STAGE);
    __syncthreads();
    for (int p = static_cast<int>(threadIdx.x); p < count; p += static_cast<int>(blockDim.x)) {
      const int32_t e = a.order[first + p];
      stage.coef[p] = get(a.entries.codes.values, a.entries.codes.dtype, e);
      stage.row[p] = source + a.row[e] * a.d;
    }
    __syncthreads();
    if (column < a.d) add_rows<T, V>(acc, stage, 0, count, source, column);
  }
}

template <class T, int V>
__device__ inline void finish_sum(const SumsArgs& a, float (&acc)[V], int64_t out_row, int64_t column) {
  if (column >= a.d) return;
  const float scale = a.scale ? *a.scale : 1.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) acc[i] *= scale;
  store<T, V>(static_cast<T*>(a.sum) + out_row * a.d + column, acc);
}

// A block for every latent that is not hot.
template <class T, int V>
__global__ void __launch_bounds__(256) sums_kernel(SumsArgs a) {
  __shared__ Stage<T> stage;
  const int64_t latent = a.latents ? a.latents[blockIdx.x] : blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const int64_t first = a.start[latent], last = a.start[latent + 1];
  if (last - first > a.chunk) return;
  float acc[V] = {};
  sum_entries<T, V>(acc, stage, a, first, last, column);
  finish_sum<T, V>(a, acc, blockIdx.x, column);
}

// Chunks of hot latents, found without asking the host how many there are. The sorted entries lie in windows of `chunk`.
// In each, at most two hot latents have a chunk that begins there: the one that the window begins with (slot 0), and the
// one that it ends with, if that is another (slot 1), since a hot latent has more entries than a window.
struct Window {
  int64_t first, last;
};
__device__ inline Window window_of(const SumsArgs& a, int64_t number) {
  const int64_t used = a.start[a.entries.m], first = number * a.chunk;
  return {first, first + a.chunk < used ? first + a.chunk : used};
}

template <class T, int V>
__global__ void __launch_bounds__(256) parts_kernel(SumsArgs a) {
  __shared__ Stage<T> stage;
  const int64_t slot = blockIdx.x % 2;
  const Window window = window_of(a, blockIdx.x / 2);
  if (window.first >= window.last) return;
  const int64_t latent = a.sorted[slot ? window.last - 1 : window.first];
  if (slot && latent == a.sorted[window.first]) return;
  const int64_t start = a.start[latent], end = a.start[latent + 1];
  if (end - start <= a.chunk) return;
  const int64_t first = slot ? start : start + cdiv(window.first - start, a.chunk) * a.chunk;
  if (first >= window.last) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  float acc[V] = {};
  sum_entries<T, V>(acc, stage, a, first, first + a.chunk < end ? first + a.chunk : end, column);
  if (column >= a.d) return;
#pragma unroll
  for (int i = 0; i < V; ++i) a.parts[blockIdx.x * a.d + column + i] = acc[i];
}

// The chunks of a hot latent in order, by the block whose window it begins in.
template <class T, int V>
__global__ void __launch_bounds__(256) join_kernel(SumsArgs a) {
  const Window window = window_of(a, blockIdx.x);
  if (window.first >= window.last) return;
  const int64_t latent = a.sorted[window.last - 1], start = a.start[latent], end = a.start[latent + 1];
  if (start < window.first || end - start <= a.chunk) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  int64_t out_row = latent;
  if (a.latents) {
    out_row = lower_bound(a.latents, a.u, latent);
    if (out_row == a.u || a.latents[out_row] != latent) return;  // not asked for
  }
  if (column >= a.d) return;
  float acc[V] = {};
  for (int64_t first = start; first < end; first += a.chunk) {
    const int64_t number = first / a.chunk;
    const int64_t slot = a.sorted[number * a.chunk] == latent ? 0 : 1;
    const float* part = a.parts + (2 * number + slot) * a.d + column;
#pragma unroll
    for (int i = 0; i < V; ++i) acc[i] += part[i];
  }
  finish_sum<T, V>(a, acc, out_row, column);
}

// A warp for every latent.
__global__ void __launch_bounds__(256) coef_sums_kernel(CoefSumsArgs a) {
  const int64_t latent = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (latent >= a.entries.m) return;  // whole warps
  float total = 0.0f;
  for (int64_t p = a.start[latent] + threadIdx.x % 32; p < a.start[latent + 1]; p += 32)
    total += get(a.entries.codes.values, a.entries.codes.dtype, a.order[p]);
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) put(a.sum, a.dtype, latent, total);
}

}  // namespace

void radix_sort(const SortArgs& args, int bits, Stream stream);

void sort_by_latent(const SortArgs& a, Stream stream) {
  const Shape shape = {{"entries", a.entries.storage}, {"n", a.entries.codes.n}, {"m", a.entries.m}};
  launch("sort by latent", shape, keys_kernel, {a.entries.codes.n, 1, 128}, stream, a);
  radix_sort(a, key_bits(a.entries.m), stream);
  launch("sort by latent", shape, start_kernel, {cdiv(a.entries.m + 1, 256), 1, 256}, stream, a);
}

void latent_sums(const SumsArgs& a, Stream stream) {
  const Shape shape = {{"entries", a.entries.storage}, {"m", a.entries.m}, {"d", a.d}, {"rows", a.u}};
  visit_vectors(a.dtype, a.d, address(a.source) | address(a.sum), [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = decltype(width)::value;
    const GatherPlan plan = gather_plan(a.d, V);
    const int64_t windows = cdiv(a.entries.storage, a.chunk);
    const auto grid = [&](int64_t x) { return Grid{x, plan.column_blocks, plan.threads}; };
    launch("sums by latent", shape, sums_kernel<T, V>, grid(a.latents ? a.u : a.entries.m), stream, a);
    launch("sums by latent", shape, parts_kernel<T, V>, grid(2 * windows), stream, a);
    launch("sums by latent", shape, join_kernel<T, V>, grid(windows), stream, a);
  });
}

void coef_sums(const CoefSumsArgs& a, Stream stream) {
  const Shape shape = {{"entries", a.entries.storage}, {"m", a.entries.m}};
  launch("bias gradients", shape, coef_sums_kernel, {cdiv(a.entries.m, 8), 1, 256}, stream, a);
}

}  // namespace fusae::cuda
