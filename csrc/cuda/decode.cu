// SPDX-License-Identifier: Apache-2.0
// out[i] = bias + Σ values[e] * weight[indices[e]]. The bytes are those of the gathered rows: nnz * d elements.
#include "cuda/gather.cuh"

namespace fusae::cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(256) decode_kernel(DecodeArgs a) {
  __shared__ Stage<T> stage;
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const Range range = entries_of(a.entries, row);
  float acc[V] = {};
  for (int64_t first = range.first; first < range.last; first += STAGE) {
    const int count = static_cast<int>(range.last - first < STAGE ? range.last - first : STAGE);
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x))
      stage_entry(stage, e, a.entries, first + e, static_cast<const T*>(a.weight), a.d);
    __syncthreads();
    if (column < a.d) add_rows<T, V>(acc, stage, 0, count, static_cast<const T*>(a.weight), column);
  }
  if (column >= a.d) return;
  if (a.bias) {
    const Pack<T, V> bias = load<T, V>(static_cast<const T*>(a.bias) + column);
#pragma unroll
    for (int i = 0; i < V; ++i) acc[i] += to_float(bias.item[i]);
  }
  store<T, V>(static_cast<T*>(a.out) + row * a.d + column, acc);
}

}  // namespace

int64_t shared_limit() {
  int device = 0, bytes = 0;
  check("shared memory", {}, cudaGetDevice(&device));
  check("shared memory", {}, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

void decode(const DecodeArgs& a, Stream stream) {
  const Shape shape = {{"n", a.entries.codes.n}, {"d", a.d}, {"m", a.entries.m}, {"entries", a.entries.storage}};
  visit_vectors(a.dtype, a.d, address(a.weight) | address(a.bias) | address(a.out), [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = decltype(width)::value;
    const GatherPlan plan = gather_plan(a.d, V);
    launch("decode", shape, decode_kernel<T, V>, {a.entries.codes.n, plan.column_blocks, plan.threads}, stream, a);
  });
}

}  // namespace fusae::cuda
