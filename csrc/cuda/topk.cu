// SPDX-License-Identifier: Apache-2.0
// Row-wise top-k of a matrix in memory. For k <= MAX_TOPK every element is read once: a block streams its row past a
// running bound, keeps what reaches it in shared memory, and cuts that back to k by radix selection when it might overflow.
#include "cuda/select.cuh"

namespace fusae::cuda {
namespace {

constexpr int THREADS = 256, LOADS = 4;  // 16-byte loads that a thread has under way

template <class T, int V>
__global__ void __launch_bounds__(THREADS) topk_kernel(TopkArgs a, TopkPlan plan) {
  FUSAE_DYNAMIC_SHARED(shared);
  __shared__ RadixScratch scratch;
  __shared__ int count;
  Key* keys = reinterpret_cast<Key*>(shared);
  const int64_t row = blockIdx.x;
  const int k = static_cast<int>(a.k);
  const T* pre = static_cast<const T*>(a.pre) + row * a.stride;
  constexpr int BLOCK = THREADS * V;
  Key bound = 0;  // of at least k keys met so far; everything reaches 0
  if (threadIdx.x == 0) count = 0;

  const auto cut = [&](int held) {
    bound = bound_of(scratch, k, [&](auto use) {
      for (int i = static_cast<int>(threadIdx.x); i < held; i += THREADS) use(keys[i]);
    });
    compact(keys, held, bound, count);
  };

  for (int64_t base = 0; base < a.m; base += BLOCK * LOADS) {
    Pack<T, V> pack[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
      const int64_t c = base + static_cast<int64_t>(u * THREADS + static_cast<int>(threadIdx.x)) * V;
      pack[u].raw = {};
      if (c < a.m) pack[u] = load<T, V>(pre + c);
    }
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
      __syncthreads();
      const int held = count;
      __syncthreads();  // everyone knows it before it grows
      if (held + BLOCK > plan.capacity) cut(held);
      const int64_t c = base + static_cast<int64_t>(u * THREADS + static_cast<int>(threadIdx.x)) * V;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Key key = key_of(to_float(pack[u].item[i]), c + i);
        if (c < a.m && key >= bound) keys[atomicAdd(&count, 1)] = key;
      }
    }
  }
  __syncthreads();
  const int held = count;
  if (held > k) cut(held);
  for (int i = k + static_cast<int>(threadIdx.x); i < plan.sorted; i += THREADS) keys[i] = 0;
  sort_descending(keys, plan.sorted);
  for (int i = static_cast<int>(threadIdx.x); i < k; i += THREADS) {
    const int32_t index = index_of(keys[i]);
    a.indices[row * a.k + i] = index;
    static_cast<T*>(a.values)[row * a.k + i] = pre[index];  // a key does not tell -0.0 from +0.0
  }
}

// As many passes over the row as the bytes of the keys that it takes to tell the k-th from the next, and one more.
template <class T>
__global__ void __launch_bounds__(1024) keys_kernel(TopkArgs a, int64_t* out) {
  __shared__ RadixScratch scratch;
  __shared__ int count;
  const int64_t row = blockIdx.x;
  const T* pre = static_cast<const T*>(a.pre) + row * a.stride;
  const auto each = [&](auto use) {
    for (int64_t c = threadIdx.x; c < a.m; c += blockDim.x) use(key_of(to_float(pre[c]), c));
  };
  if (threadIdx.x == 0) count = 0;
  const Key bound = bound_of(scratch, static_cast<int>(a.k), each);
  __syncthreads();
  each([&](Key key) {
    if (key >= bound) out[row * a.k + atomicAdd(&count, 1)] = static_cast<int64_t>(key ^ (Key{1} << 63));
  });
}

}  // namespace

void topk(const TopkArgs& a, Stream stream) {
  const Shape shape = {{"n", a.n}, {"m", a.m}, {"k", a.k}};
  if (a.k < 1 || a.k > MAX_TOPK || a.k > a.m)
    throw std::invalid_argument("topk: k must lie in [1, " + std::to_string(MAX_TOPK) + "] and not pass m");
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int item = sizeof(T), wide = 16 / item;
    const auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      const TopkPlan plan = topk_plan(a.k, THREADS * V);
      launch("topk", shape, topk_kernel<T, V>, {a.n, 1, THREADS, sizeof(Key) * static_cast<size_t>(plan.capacity)}, stream,
             a, plan);
    };
    // Rows begin at multiples of 16 bytes and end with one.
    if (vector_width(a.stride, item, address(a.pre) | static_cast<uintptr_t>(a.m * item)) == wide) {
      run(std::integral_constant<int, wide>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

void topk_keys(const TopkArgs& a, int64_t* keys, Stream stream) {
  const Shape shape = {{"n", a.n}, {"m", a.m}, {"k", a.k}};
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("topk", shape, keys_kernel<T>, {a.n, 1, 1024}, stream, a, keys);
  });
}

}  // namespace fusae::cuda
