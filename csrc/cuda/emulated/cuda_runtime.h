// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that the kernels of fusae use, on a CPU: the same kernel source is compiled by the host's
// compiler and runs in the tests, at small sizes. Blocks run one after the other; the threads of a block are fibres
// that take turns where they meet (barriers, shuffles), in another order at every launch. It shows wrong indices, wrong
// arithmetic and missing barriers; not the memory model, and no speed.
#pragma once
#define FUSAE_EMULATED 1

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define FUSAE_DYNAMIC_SHARED(name) unsigned char* const name = ::fusae::emulated::machine().dynamic.data()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fusae::emulated {

// Lanes of a warp exchange values here. Two buffers: a lane may be a whole exchange ahead of one that still reads.
struct Warp {
  uint64_t slot[2][32];
  unsigned present[2], alive, arrived, mask;
  int64_t exchanges;
};

struct Fibre {
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;
  jmp_buf at;
  bool started, done, at_barrier;
  int64_t waiting_for;  // exchange of its warp that has to be over, or -1
};

struct Machine {
  static constexpr size_t STACK = 64 << 10;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<unsigned char> dynamic = std::vector<unsigned char>(16);
  std::function<void()> body;
  ucontext_t main_context;
  jmp_buf main_at;
  unsigned current = 0, threads = 0, alive = 0, arrived = 0;
  uint64_t launches = 0;

  [[noreturn]] static void stop(const char* what) {
    std::fprintf(stderr, "emulated CUDA: %s (block %u, %u; thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
    std::abort();
  }

  void yield() {
    const unsigned me = current;
    if (_setjmp(fibres[me].at) == 0) _longjmp(main_at, 1);
    threadIdx = dim3(me);
  }

  void barrier() {
    Fibre& fibre = fibres[current];
    fibre.at_barrier = true;
    if (++arrived == alive) release();
    while (fibre.at_barrier) yield();
  }
  void release() {
    arrived = 0;
    for (unsigned t = 0; t < threads; ++t) fibres[t].at_barrier = false;
  }

  // Every lane of `mask` gives a value; when all have, each gets the buffer that holds them.
  const uint64_t* exchange(unsigned mask, uint64_t value) {
    Warp& warp = warps[current / 32];
    const unsigned lane = current % 32, bit = 1u << lane;
    if (!(mask & bit)) stop("a lane that is not in the mask");
    if (mask & ~warp.alive) stop("the mask holds a lane that has returned or was never there");
    if (warp.arrived && warp.mask != mask) stop("lanes meet with different masks");
    const int buffer = static_cast<int>(warp.exchanges % 2);
    warp.mask = mask;
    warp.slot[buffer][lane] = value;
    warp.arrived |= bit;
    const int64_t mine = warp.exchanges;
    if (warp.arrived == mask) {
      warp.arrived = 0;
      ++warp.exchanges;
    }
    while (warp.exchanges == mine) {
      fibres[current].waiting_for = mine;
      yield();
    }
    fibres[current].waiting_for = -1;
    return warp.slot[buffer];
  }

  static void enter();

  bool can_run(unsigned t) const {
    const Fibre& f = fibres[t];
    return !f.done && !f.at_barrier && (f.waiting_for < 0 || warps[t / 32].exchanges > f.waiting_for);
  }

  void resume(unsigned t) {
    current = t;
    threadIdx = dim3(t);
    if (_setjmp(main_at) == 0) {
      Fibre& f = fibres[t];
      if (f.started) _longjmp(f.at, 1);
      f.started = true;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = STACK;
      f.context.uc_link = nullptr;
      makecontext(&f.context, &Machine::enter, 0);
      setcontext(&f.context);
    }
  }

  void run_block() {
    std::fill(dynamic.begin(), dynamic.end(), static_cast<unsigned char>(0xff));  // NaN
    arrived = 0;
    alive = threads;
    warps.assign((threads + 31) / 32, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
      warps[t / 32].alive |= 1u << (t % 32);
      Fibre& f = fibres[t];
      f.started = f.done = f.at_barrier = false;
      f.waiting_for = -1;
    }
    const unsigned start = static_cast<unsigned>(launches * 37 % threads);
    while (alive) {
      bool moved = false;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = (launches % 2 ? threads - 1 - i : i + start) % threads;
        if (!can_run(t)) continue;
        moved = true;
        resume(t);
      }
      if (!moved) stop("threads wait for each other");
    }
  }

  void run(const dim3& grid, unsigned block, size_t shared, std::function<void()> kernel) {
    body = std::move(kernel);
    threads = block;
    gridDim = grid;
    blockDim = dim3(block);
    dynamic.resize(std::max<size_t>(shared, 16));
    while (fibres.size() < block) {
      fibres.emplace_back();
      fibres.back().stack.reset(new unsigned char[STACK]);
    }
    ++launches;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = launches % 3 == 1 ? i : blocks - 1 - i;
      blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x));
      run_block();
    }
  }
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void Machine::enter() {
  Machine& m = machine();
  m.body();
  m.fibres[m.current].done = true;
  m.warps[m.current / 32].alive &= ~(1u << (m.current % 32));
  --m.alive;
  if (m.alive && m.arrived == m.alive) m.release();  // a thread that has returned counts as arrived
  _longjmp(m.main_at, 1);
}

template <class T>
uint64_t bits_of(T a) {
  uint64_t u = 0;
  static_assert(sizeof(T) <= 8);
  std::memcpy(&u, &a, sizeof(T));
  return u;
}
template <class T>
T value_of(uint64_t u) {
  T a;
  std::memcpy(&a, &u, sizeof(T));
  return a;
}

}  // namespace fusae::emulated

// --- device functions ----------------------------------------------------------------------------------------------

inline void __syncthreads() { fusae::emulated::machine().barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fusae::emulated::machine().exchange(mask, 0); }
template <class T>
T __shfl_sync(unsigned mask, T a, int lane) {
  return fusae::emulated::value_of<T>(fusae::emulated::machine().exchange(mask, fusae::emulated::bits_of(a))[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T a, int step) {
  const unsigned lane = fusae::emulated::machine().current % 32;
  return fusae::emulated::value_of<T>(
      fusae::emulated::machine().exchange(mask, fusae::emulated::bits_of(a))[lane ^ static_cast<unsigned>(step)]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T a, unsigned step) {
  const unsigned lane = fusae::emulated::machine().current % 32;
  return fusae::emulated::value_of<T>(
      fusae::emulated::machine().exchange(mask, fusae::emulated::bits_of(a))[lane < step ? lane : lane - step]);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = fusae::emulated::machine().exchange(mask, vote);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) result |= ((mask >> lane) & 1) && votes[lane] ? 1u << lane : 0u;
  return result;
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline float __uint_as_float(uint32_t u) { return fusae::emulated::value_of<float>(u); }
inline float __int_as_float(int u) { return fusae::emulated::value_of<float>(static_cast<uint32_t>(u)); }
inline uint32_t __float_as_uint(float a) { return static_cast<uint32_t>(fusae::emulated::bits_of(a)); }
// Fibres do not interrupt each other.
template <class T, class U>
T atomicAdd(T* at, U a) {
  const T before = *at;
  *at = static_cast<T>(before + a);
  return before;
}

// --- host functions ------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
// The least of compute capability 8: 99 KB; and few multiprocessors, so that persistent blocks have several turns.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 99 << 10;
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  if (config->blockDim.x % 32 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  fusae::emulated::machine().run(config->gridDim, config->blockDim.x, config->dynamicSmemBytes,
                                 [&] { kernel(args...); });
  return cudaSuccess;
}
