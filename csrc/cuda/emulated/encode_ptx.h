// SPDX-License-Identifier: Apache-2.0
// The instructions of `cuda/encode_ptx.cuh` on a CPU, as the PTX ISA describes them. What is asynchronous is done as
// late as it may be (copies and products when they are waited for) or at any time (TMA): a wait that is missing, or a
// buffer that is handed back too early, gives wrong numbers. The blocks of a cluster are parts of one emulated block.
#pragma once
#include <deque>

#include "cuda_runtime.h"
#include "fusae/dtype.h"

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class T>
T atomicMax(T* at, T a) {
  const T before = *at;
  *at = before < a ? a : before;
  return before;
}
template <class T>
T atomicMin(T* at, T a) {
  const T before = *at;
  *at = a < before ? a : before;
  return before;
}

namespace fusae::cuda {

// A matrix of 16-bit elements [rows, columns] as TMA sees it, and the boxes that are fetched of it.
struct TensorMap {
  const unsigned char* base;
  int64_t rows, columns, row_bytes;
  int box_rows;
};

namespace emulated {

constexpr int64_t PATIENCE = 20000000;  // turns of a fibre that waits for what never comes

inline ::fusae::emulated::Machine& m() { return ::fusae::emulated::machine(); }

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Product {
  uint64_t a, b;
  int more;
  bool half;
};
template <class T>
struct Groups {  // of one thread: open, and committed ones from the oldest on
  std::vector<T> open;
  std::deque<std::vector<T>> committed;
};
struct Box {
  unsigned char* to;
  TensorMap map;
  int column, row;
  unsigned barrier;  // offset in the shared memory of a block
  unsigned offset;
  uint16_t mask;
};
struct Meeting {
  int arrived;
  int64_t turns;
};

struct State {
  int blocks = 1;  // of the cluster
  std::vector<Groups<Copy>> copies = std::vector<Groups<Copy>>(1024);
  std::vector<Groups<Product>> products = std::vector<Groups<Product>>(1024);
  std::deque<Box> boxes;  // on their way
  Meeting meeting[2][16] = {};
  uint32_t random = 1;
};
inline State& state() {
  static State s;
  return s;
}
inline int block_threads() { return static_cast<int>(blockDim.x) / state().blocks; }
inline size_t block_bytes() { return m().dynamic.size() / static_cast<size_t>(state().blocks); }
inline unsigned char* memory_of(int rank) { return m().dynamic.data() + static_cast<size_t>(rank) * block_bytes(); }

// mbarrier: how many arrivals are missing, how many a phase has, bytes that are missing.
struct Barrier {
  int32_t bytes;
  uint8_t expected, pending, phase, unused;
};
static_assert(sizeof(Barrier) == 8);
inline void settle(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.expected;
}

// One box of those on their way, any of them.
inline void deliver() {
  State& s = state();
  if (s.boxes.empty()) return;
  s.random = s.random * 1664525u + 1013904223u;
  const size_t pick = (s.random >> 8) % s.boxes.size();
  const Box box = s.boxes[pick];
  s.boxes.erase(s.boxes.begin() + static_cast<std::ptrdiff_t>(pick));
  for (int rank = 0; rank < s.blocks; ++rank) {
    if (!(box.mask >> rank & 1)) continue;
    for (int r = 0; r < box.map.box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        const int64_t row = box.row + r, column = box.column + c;
        uint16_t element = 0;
        if (row >= 0 && row < box.map.rows && column >= 0 && column < box.map.columns)
          std::memcpy(&element, box.map.base + row * box.map.row_bytes + 2 * column, 2);
        // Swizzle of 128 bytes: bits 4..6 of the shared address with bits 7..9.
        uint32_t at = box.offset + static_cast<uint32_t>(r * 128 + 2 * c);
        at ^= (at >> 7 & 7) << 4;
        std::memcpy(memory_of(rank) + at, &element, 2);
      }
    }
    Barrier& barrier = *reinterpret_cast<Barrier*>(memory_of(rank) + box.barrier);
    barrier.bytes -= box.map.box_rows * 128;
    settle(barrier);
  }
}

inline float element(uint16_t bits, bool half) { return half ? f16_to_float(bits) : bf16_to_float(bits); }

// Element k of row r of a matrix behind a descriptor: rows along k, 128-byte swizzle.
inline float matrix_element(uint64_t descriptor, int r, int k, bool half, int rank) {
  if (descriptor >> 62 != 1) ::fusae::emulated::Machine::stop("a descriptor without the 128-byte swizzle");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  uint32_t at = start + static_cast<uint32_t>(r / 8) * stride + static_cast<uint32_t>(r % 8) * 128 + static_cast<uint32_t>(2 * k);
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, memory_of(rank) + at, 2);
  return element(bits, half);
}

}  // namespace emulated

inline int thread_index() { return static_cast<int>(threadIdx.x) % emulated::block_threads(); }
inline uint32_t cluster_rank() { return threadIdx.x / static_cast<unsigned>(emulated::block_threads()); }
inline uint32_t cluster_size() { return static_cast<uint32_t>(emulated::state().blocks); }
inline int64_t cluster_index() { return blockIdx.x; }
inline int64_t cluster_count() { return gridDim.x; }
inline void cluster_sync() { __syncthreads(); }
inline unsigned char* shared_memory() { return emulated::memory_of(static_cast<int>(cluster_rank())); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_memory());
}

inline void named_barrier_arrive(int number, int threads) {
  emulated::Meeting& meeting = emulated::state().meeting[cluster_rank()][number];
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.turns;
  }
}
inline void named_barrier(int number, int threads) {
  emulated::Meeting& meeting = emulated::state().meeting[cluster_rank()][number];
  const int64_t turn = meeting.turns;
  named_barrier_arrive(number, threads);
  for (int64_t i = 0; meeting.turns == turn; ++i) {
    if (i > emulated::PATIENCE) ::fusae::emulated::Machine::stop("a named barrier is never complete");
    emulated::m().yield();
  }
}

// --- sm_80 -----------------------------------------------------------------------------------------------------------

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16)
    ::fusae::emulated::Machine::stop("cp.async of 16 bytes that are not aligned");
  emulated::state().copies[threadIdx.x].open.push_back({to, from, bytes});
}
inline void copy_commit() {
  auto& groups = emulated::state().copies[threadIdx.x];
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}
template <int PENDING>
void copy_wait() {
  auto& groups = emulated::state().copies[threadIdx.x];
  while (static_cast<int>(groups.committed.size()) > PENDING) {
    for (const emulated::Copy& copy : groups.committed.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    groups.committed.pop_front();
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned lane = threadIdx.x % 32;
  const uint64_t* const rows = emulated::m().exchange(0xffffffffu, reinterpret_cast<uint64_t>(row));
  uint64_t from[4];
  for (unsigned i = 0; i < 4; ++i) from[i] = rows[8 * i + lane / 4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], reinterpret_cast<const unsigned char*>(from[i]) + lane % 4 * 4, 4);
}

namespace emulated {
struct Fragments {
  uint32_t a[32][4], b[32][2];
};
inline Fragments fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments f;
  const uint64_t mine[3] = {a[0] | static_cast<uint64_t>(a[1]) << 32, a[2] | static_cast<uint64_t>(a[3]) << 32,
                            b0 | static_cast<uint64_t>(b1) << 32};
  for (int i = 0; i < 3; ++i) {
    const uint64_t* const all = m().exchange(0xffffffffu, mine[i]);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t* const to = i < 2 ? f.a[lane] + 2 * i : f.b[lane];
      to[0] = static_cast<uint32_t>(all[lane]);
      to[1] = static_cast<uint32_t>(all[lane] >> 32);
    }
  }
  return f;
}
// Of m16n8k16: A's registers are rows g and g + 8 with k 0..7, then the same with k 8..15; B's k 0..7 and 8..15.
template <bool HALF>
void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragments f = fragments(a, b0, b1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = f.a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], right = f.b[column * 4 + k % 8 / 2][k / 8];
      sum += static_cast<double>(element(static_cast<uint16_t>(left >> (16 * (k % 2))), HALF)) *
             element(static_cast<uint16_t>(right >> (16 * (k % 2))), HALF);
    }
    c[e] = static_cast<float>(sum);
  }
}
}  // namespace emulated

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emulated::mma_16<false>(c, a, b0, b1); }
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { emulated::mma_16<true>(c, a, b0, b1); }
// To the nearest of 10 bits, ties away from zero.
inline uint32_t round_tf32(uint32_t u) { return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u; }
// Of m16n8k8: A's registers are rows g and g + 8 with k 0..3, then with k 4..7; B's k 0..3 and 4..7.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulated::Fragments f = emulated::fragments(a, b0, b1);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 8; ++k)
      sum += static_cast<double>(__uint_as_float(f.a[row % 8 * 4 + k % 4][k / 4 * 2 + row / 8])) *
             __uint_as_float(f.b[column * 4 + k % 4][k / 4]);
    c[e] = static_cast<float>(sum);
  }
}

// --- Hopper ------------------------------------------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<emulated::Barrier*>(barrier) = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, int bytes) {
  emulated::Barrier& b = *reinterpret_cast<emulated::Barrier*>(barrier);
  if (b.pending == 0) ::fusae::emulated::Machine::stop("more arrivals at an mbarrier than a phase has");
  b.bytes += bytes;
  --b.pending;
  emulated::settle(b);
}
inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  emulated::Barrier& b =
      *reinterpret_cast<emulated::Barrier*>(emulated::memory_of(static_cast<int>(rank)) + shared_address(barrier));
  if (b.pending == 0) ::fusae::emulated::Machine::stop("more arrivals at an mbarrier than a phase has");
  --b.pending;
  emulated::settle(b);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const volatile emulated::Barrier& b = *reinterpret_cast<emulated::Barrier*>(barrier);
  for (int64_t i = 0; b.phase == parity; ++i) {  // the phase of that parity is not over
    if (i > emulated::PATIENCE) ::fusae::emulated::Machine::stop("an mbarrier's phase never ends");
    emulated::deliver();
    emulated::m().yield();
  }
}
inline void tensor_load_all(void* to, const TensorMap* map, int column, int row, uint64_t* barrier, uint16_t mask) {
  const uint32_t offset = shared_address(to);
  if (offset % 1024) ::fusae::emulated::Machine::stop("a swizzled box that is no multiple of 1024 bytes in");
  emulated::state().boxes.push_back({nullptr, *map, column, row, shared_address(barrier), offset, mask});
}
inline void tensor_load(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  tensor_load_all(to, map, column, row, barrier, static_cast<uint16_t>(1u << cluster_rank()));
}
inline void tensor_prefetch(const TensorMap*) {}
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}

inline void products_begin() {}
inline void products_commit() {
  auto& groups = emulated::state().products[threadIdx.x];
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}
inline void products_bf16(float (&)[1][32][4], uint64_t a, uint64_t b, int more) {
  emulated::state().products[threadIdx.x].open.push_back({a, b, more, false});
}
inline void products_f16(float (&)[1][32][4], uint64_t a, uint64_t b, int more) {
  emulated::state().products[threadIdx.x].open.push_back({a, b, more, true});
}
// The accumulators of wgmma m64n256k16: thread t of the warpgroup has rows t / 32 * 16 + t % 32 / 4 and + 8 of it, of
// each block of 8 columns those at t % 4 * 2 and + 1.
template <int PENDING>
void products_wait(float (&acc)[1][32][4]) {
  auto& groups = emulated::state().products[threadIdx.x];
  const int t = static_cast<int>(threadIdx.x) % 128, rank = static_cast<int>(cluster_rank());
  while (static_cast<int>(groups.committed.size()) > PENDING) {
    for (const emulated::Product& p : groups.committed.front()) {
      float left[2][16];
      for (int h = 0; h < 2; ++h) {
        for (int k = 0; k < 16; ++k)
          left[h][k] = emulated::matrix_element(p.a, t / 32 * 16 + t % 32 / 4 + 8 * h, k, p.half, rank);
      }
      for (int j = 0; j < 32; ++j) {
        for (int e = 0; e < 2; ++e) {
          float sum[2] = {p.more ? acc[0][j][e] : 0.0f, p.more ? acc[0][j][2 + e] : 0.0f};
          for (int k = 0; k < 16; ++k) {
            const float right = emulated::matrix_element(p.b, 8 * j + t % 4 * 2 + e, k, p.half, rank);
            sum[0] += left[0][k] * right;
            sum[1] += left[1][k] * right;
          }
          acc[0][j][e] = sum[0];
          acc[0][j][2 + e] = sum[1];
        }
      }
    }
    groups.committed.pop_front();
  }
  __syncwarp();  // .sync.aligned: a warp waits as one
}

}  // namespace fusae::cuda
