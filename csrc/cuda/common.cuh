// SPDX-License-Identifier: Apache-2.0
// What all CUDA kernels share: launches that are checked, element types, 16-byte accesses, reductions.
//
// The kernels use of CUDA what `emulated/cuda_runtime.h` has too, so that the same source runs on a CPU in the tests.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fusae/cuda_ops.h"
#include "fusae/cuda_plan.h"

#ifndef FUSAE_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// Dynamic shared memory as bytes; the same declaration in every kernel.
#define FUSAE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fusae::cuda {

// --- launches ------------------------------------------------------------------------------------------------------

struct Size {
  const char* name;
  int64_t value;
};
using Shape = std::initializer_list<Size>;

[[noreturn]] inline void fail(const char* op, Shape shape, cudaError_t error) {
  std::string text = std::string(op) + "(";
  for (const Size& s : shape) text += (text.back() == '(' ? "" : ", ") + std::string(s.name) + "=" + std::to_string(s.value);
  int device = -1;
  (void)cudaGetDevice(&device);
  throw std::runtime_error(text + ") on CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
}

inline void check(const char* op, Shape shape, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the next call is not to be blamed for it
  fail(op, shape, error);
}

struct Grid {
  int64_t x, y;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
};

// Enqueues a kernel. An empty grid is no launch; one beyond CUDA's limits is an error that names the op.
template <class... P, class... A>
void launch(const char* op, Shape shape, void (*kernel)(P...), const Grid& grid, Stream stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  if (grid.x > MAX_GRID_X || grid.y > MAX_GRID_Y) fail(op, shape, cudaErrorInvalidConfiguration);
  if (grid.shared > 48 * 1024) {
    check(op, shape, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(grid.shared)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads), 1, 1);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(op, shape, cudaLaunchKernelEx(&config, kernel, P(args)...));
  check(op, shape, cudaGetLastError());
}


// --- elements ------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(bf16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
#ifdef FUSAE_EMULATED
inline float to_float(f16 a) { return f16_to_float(a.bits); }
inline bf16 make_bf16(float a) { return {float_to_bf16(a)}; }
inline f16 make_f16(float a) { return {float_to_f16(a)}; }
#else
__device__ inline float to_float(f16 a) { return __half2float(__ushort_as_half(a.bits)); }
__device__ inline bf16 make_bf16(float a) { return {__bfloat16_as_ushort(__float2bfloat16_rn(a))}; }
__device__ inline f16 make_f16(float a) { return {__half_as_ushort(__float2half_rn(a))}; }
#endif

template <class T>
__device__ inline T from_float(float a) {
  if constexpr (std::is_same_v<T, float>) {
    return a;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return make_bf16(a);
  } else {
    return make_f16(a);
  }
}

// An element whose dtype is known at run time: of codes, of which there is one for a whole row of the weights.
__device__ inline float get(const void* base, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(base)[at];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(base)[at]);
  return to_float(static_cast<const f16*>(base)[at]);
}
__device__ inline void put(void* base, DType dtype, int64_t at, float a) {
  if (dtype == DType::f32) {
    static_cast<float*>(base)[at] = a;
  } else if (dtype == DType::bf16) {
    static_cast<bf16*>(base)[at] = make_bf16(a);
  } else {
    static_cast<f16*>(base)[at] = make_f16(a);
  }
}

// V elements in one access.
template <int BYTES>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};
template <>
struct RawOf<2> {
  using type = uint16_t;
};

template <class T, int V>
union Pack {
  typename RawOf<static_cast<int>(sizeof(T)) * V>::type raw;
  T item[V];
};

template <class T, int V>
__device__ inline Pack<T, V> load(const T* from) {
  Pack<T, V> p;
  p.raw = *reinterpret_cast<const decltype(p.raw)*>(from);
  return p;
}
template <class T, int V>
__device__ inline void store(T* to, const float (&a)[V]) {
  Pack<T, V> p;
#pragma unroll
  for (int i = 0; i < V; ++i) p.item[i] = from_float<T>(a[i]);
  *reinterpret_cast<decltype(p.raw)*>(to) = p.raw;
}

// Calls f with a null pointer of the storage type and the width of its accesses.
template <class F>
void visit_vectors(DType dtype, int64_t d, uintptr_t addresses, F f) {
  visit(dtype, [&](auto* type) {
    constexpr int item = sizeof(*type), wide = 16 / item;
    if (vector_width(d, item, addresses) == 1) {
      f(type, std::integral_constant<int, 1>{});
    } else {
      f(type, std::integral_constant<int, wide>{});
    }
  });
}

inline uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

// --- reductions: the order of additions is fixed by the lanes ------------------------------------------------------

constexpr unsigned FULL = 0xffffffffu;

__device__ inline float warp_sum(float a) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(FULL, a, step);
  return a;
}

__device__ inline int warp_sum(int a) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(FULL, a, step);
  return a;
}
__device__ inline uint32_t warp_max(uint32_t a) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t b = __shfl_xor_sync(FULL, a, step);
    a = b > a ? b : a;
  }
  return a;
}

// The sum over a block of at most 1024 threads, in every thread. `parts` is shared memory for 32 numbers.
template <class N>
__device__ inline N block_sum(N a, N* parts) {
  a = warp_sum(a);
  const int warps = static_cast<int>(blockDim.x) / 32;
  __syncthreads();  // what another sum left in `parts` was read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = a;
  __syncthreads();
  N total = 0;
  for (int w = 0; w < warps; ++w) total += parts[w];
  return total;
}

}  // namespace fusae::cuda
