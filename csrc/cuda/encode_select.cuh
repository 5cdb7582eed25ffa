// SPDX-License-Identifier: Apache-2.0
// Exact selection among entries with unique keys, by blocks of threads: bounds by bisection (no histogram, no tie to
// break), cuts in place, bitonic sorts. Of rows of candidates: what the sample says of a row (`row_bounds`), the
// certificate and the codes of certified rows (`finish_rows`).
#pragma once
#include "cuda/common.cuh"
#include "cuda/encode_keys.cuh"
#include "cuda/encode_ptx.cuh"

namespace fusae::cuda {

// What the threads of a block tell each other: two buffers in turn, so that one barrier an exchange is enough.
struct Exchange {
  uint64_t part[2][32];
  int turn;  // of thread 0's; every thread keeps its own beside it
};

struct Block {
  Exchange* exchange;
  int threads, turn;

  template <class Op>
  __device__ __forceinline__ uint64_t reduce(uint64_t a, Op op) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) a = op(a, __shfl_xor_sync(0xffffffffu, a, step));
    if (threadIdx.x % 32 == 0) exchange->part[turn][threadIdx.x / 32] = a;
    __syncthreads();
    a = exchange->part[turn][0];
    for (int w = 1; w < threads / 32; ++w) a = op(a, exchange->part[turn][w]);
    turn ^= 1;
    return a;
  }
  __device__ __forceinline__ uint64_t sum(uint64_t a) {
    return reduce(a, [](uint64_t p, uint64_t q) { return p + q; });
  }
  __device__ __forceinline__ uint64_t largest(uint64_t a) {
    return reduce(a, [](uint64_t p, uint64_t q) { return p > q ? p : q; });
  }
  __device__ __forceinline__ uint64_t least(uint64_t a) {
    return reduce(a, [](uint64_t p, uint64_t q) { return p < q ? p : q; });
  }
  // How many threads before this one say yes; `total` of all.
  __device__ __forceinline__ int before(bool yes, int& total) {
    const unsigned votes = __ballot_sync(0xffffffffu, yes), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) exchange->part[turn][warp] = static_cast<uint64_t>(__popc(votes));
    __syncthreads();
    int sum = __popc(votes & ((1u << lane) - 1));
    total = 0;
    for (int w = 0; w < threads / 32; ++w) {
      const int part = static_cast<int>(exchange->part[turn][w]);
      if (w < static_cast<int>(warp)) sum += part;
      total += part;
    }
    turn ^= 1;
    return sum;
  }
};

// The largest bound with at least min(k, count) of the block's keys at or above it. count_from(b): this thread's keys
// at or above b.
template <class CountFrom>
__device__ uint64_t bisect(Block& block, uint64_t low, uint64_t high, int64_t wanted, CountFrom count_from) {
  while (low < high) {  // `wanted` at or above low; fewer above high
    const uint64_t middle = high - (high - low) / 2;
    const int64_t found = static_cast<int64_t>(block.sum(static_cast<uint64_t>(count_from(middle))));
    if (found == wanted) return middle;
    if (found > wanted) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A bound with exactly min(k, count) of the `count` entries at or above it.
__device__ inline uint64_t entries_bound(Block& block, const Entry* entries, int64_t count, int64_t k, const Scoring& s) {
  if (count <= k) return 0;
  uint64_t low = ~0ull, high = 0;
  for (int64_t i = threadIdx.x; i < count; i += block.threads) {
    const uint64_t key = entry_key(entries[i], s);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  low = block.least(low);
  high = block.largest(high);
  return bisect(block, low, high, k, [&](uint64_t bound) {
    int64_t found = 0;
    for (int64_t i = threadIdx.x; i < count; i += block.threads) found += entry_key(entries[i], s) >= bound;
    return found;
  });
}

// Keeps those of the first `count` entries that reach the bound, in place; returns how many.
__device__ inline int64_t cut(Block& block, Entry* entries, int64_t count, uint64_t bound, const Scoring& s) {
  int64_t kept = 0;
  for (int64_t first = 0; first < count; first += block.threads) {
    const int64_t i = first + threadIdx.x;
    const Entry entry = i < count ? entries[i] : 0;
    const bool keep = i < count && entry_key(entry, s) >= bound;
    int total;
    const int place = block.before(keep, total);  // every thread has read its entry when it has passed this
    if (keep) entries[kept + place] = entry;      // at or before what was read
    kept += total;
  }
  __syncthreads();
  return kept;
}

FUSAE_PURE int64_t power_of_2(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Sorts `count` entries, best first. `room` is a power of two >= count; what lies behind is overwritten.
__device__ inline void sort_entries(Block& block, Entry* entries, int64_t count, int64_t room, const Scoring& s) {
  // Entries that are none: below all others. No latent has this number.
  const Entry nothing = ~0ull;
  for (int64_t i = count + threadIdx.x; i < room; i += block.threads) entries[i] = nothing;
  __syncthreads();
  for (int64_t size = 2; size <= room; size *= 2) {
    for (int64_t step = size / 2; step > 0; step /= 2) {
      for (int64_t pair = threadIdx.x; pair < room / 2; pair += block.threads) {
        const int64_t i = pair / step * 2 * step + pair % step, j = i + step;
        const Entry a = entries[i], b = entries[j];
        const uint64_t left = a == nothing ? 0 : entry_key(a, s), right = b == nothing ? 0 : entry_key(b, s);
        if ((left < right) == ((i & size) == 0)) {
          entries[i] = b;
          entries[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

template <class T>
__device__ __forceinline__ T code_value(float pre, bool relu) {
  return from_float<T>(relu && pre <= 0.0f ? 0.0f : pre);  // NaN stays
}

// Sorted entries as the codes of a row; behind them (a mask with few latents) zeros at the latents of `fill`.
template <class T>
__device__ inline void write_codes(const Entry* entries, int64_t count, int64_t row, const Selection& s, bool relu) {
  T* const values = static_cast<T*>(s.values) + row * s.k;
  int32_t* const indices = s.indices + row * s.k;
  for (int64_t i = threadIdx.x; i < s.k; i += blockDim.x) {
    if (i < count) {
      values[i] = code_value<T>(entry_pre(entries[i]), relu);
      indices[i] = entry_latent(entries[i]);
    } else {
      values[i] = from_float<T>(0.0f);
      indices[i] = s.fill ? s.fill[i - count] : 0;
    }
  }
}

// --- what the sample says ------------------------------------------------------------------------------------------

// The `rank`-th largest sampled score of every row, and the latent where it was: what is at or above both is a
// candidate. -Inf (all are) where fewer latents of the mask were sampled; where it is NaN, +Inf and NaN are candidates.
// Scores stay in registers, in their order as integers.
template <int ITEMS>
__global__ void __launch_bounds__(512) row_bounds(const float* scores, int size, int32_t step, Selection s) {
  unsigned char* const memory = shared_memory();
  Block block{reinterpret_cast<Exchange*>(memory), static_cast<int>(blockDim.x), 0};
  const int64_t row = blockIdx.x;
  uint32_t key[ITEMS];
  int valid = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int j = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
    const bool inside = j < size && (!s.mask || s.mask[sampled_latent(j, step)]);
    key[i] = inside ? order_bits(scores[row * size + j]) : 0u;
    valid += inside;
  }
  const int64_t found = static_cast<int64_t>(block.sum(static_cast<uint64_t>(valid)));
  float bound = bits_float(0xff800000u);
  int32_t last = INT32_MAX;
  if (found >= s.rank) {
    uint32_t high = 0, low = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      high = key[i] > high ? key[i] : high;
      low = key[i] && key[i] < low ? key[i] : low;
    }
    high = static_cast<uint32_t>(block.largest(high));
    low = static_cast<uint32_t>(block.least(low));
    const auto count_from = [&](uint64_t least) {
      int c = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) c += key[i] >= least;
      return c;
    };
    uint32_t least = static_cast<uint32_t>(bisect(block, low, high, s.rank, count_from));
    // With exactly `rank` at or above, the score is the least of them; else it is `least` itself, of which too many are.
    uint32_t smallest = 0xffffffffu;
    int above = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (key[i] >= least && key[i] < smallest) smallest = key[i];
    }
    least = static_cast<uint32_t>(block.least(smallest));
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) above += key[i] > least;
    const int64_t wanted = s.rank - static_cast<int64_t>(block.sum(static_cast<uint64_t>(above)));
    // The wanted-th sampled latent that has it, in order: bisect places from the end, so that larger is earlier.
    const uint64_t place = bisect(block, 0, static_cast<uint64_t>(size - 1), wanted, [&](uint64_t from) {
      int c = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        const int j = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
        c += key[i] == least && static_cast<uint64_t>(size - 1 - j) >= from;
      }
      return c;
    });
    bound = from_order_bits(least);
    last = sampled_latent(size - 1 - static_cast<int>(place), step);
    if (bound != bound) {
      bound = bits_float(0x7f800000u);
      last = -1;
    }
  }
  if (threadIdx.x == 0) {
    s.bound[row] = bound;
    s.last[row] = last;
    s.tally[row] = 0;
    if (row == 0) *s.failed = 0;
  }
}

// --- certified rows ------------------------------------------------------------------------------------------------

// A row whose tally is at least k and at most what its buffer holds has all of its k best in there, whatever the sample
// was. They become its codes; any other row goes on the list.
template <class T>
__global__ void __launch_bounds__(128) finish_rows(EncodeInput in, Selection s, bool relu) {
  unsigned char* const memory = shared_memory();
  Block block{reinterpret_cast<Exchange*>(memory), static_cast<int>(blockDim.x), 0};
  Entry* const kept = reinterpret_cast<Entry*>(memory + sizeof(Exchange));  // [max(cap, 2^⌈k⌉)]
  const int64_t row = blockIdx.x;
  const int64_t count = s.tally[row];
  const int64_t limit = s.limit ? *s.limit : s.k, wanted = limit < s.k ? limit : s.k;
  if (count < wanted || count > s.cap) {
    if (threadIdx.x == 0) s.list[atomicAdd(s.failed, 1)] = static_cast<int32_t>(row);
    return;
  }
  const Scoring scoring{in.norms, in.magnitude};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) kept[i] = s.entries[row * s.cap + i];
  __syncthreads();
  const uint64_t bound = entries_bound(block, kept, count, wanted, scoring);
  const int64_t left = count > wanted ? cut(block, kept, count, bound, scoring) : count;
  sort_entries(block, kept, left, power_of_2(left), scoring);
  write_codes<T>(kept, left, row, s, relu);
}

}  // namespace fusae::cuda
