// SPDX-License-Identifier: Apache-2.0
// From a pool of entries in the order of arrival to ragged codes, latents ascending in every row: nothing is sorted. A
// row's latents are set in a bitmap in shared memory, whose running count tells every entry its place.
#pragma once
#include "cuda/encode_select.cuh"

namespace fusae::cuda {

constexpr int WINDOW_WORDS = 4096, WINDOW = 32 * WINDOW_WORDS;  // latents that a bitmap holds at a time
constexpr int RANK_THREADS = 256;

struct RankShared {
  Exchange exchange;
  uint32_t word[WINDOW_WORDS];
  int32_t before[WINDOW_WORDS];
};

// The sum of what the threads before this one have; `total` of all.
__device__ inline int64_t scan(Block& block, int64_t mine, int64_t& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = mine;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  uint64_t* const part = block.exchange->part[block.turn];
  if (lane == 31) part[warp] = static_cast<uint64_t>(sum);
  __syncthreads();
  int64_t before = sum - mine;
  total = 0;
  for (int w = 0; w < block.threads / 32; ++w) {
    if (w < static_cast<int>(warp)) before += static_cast<int64_t>(part[w]);
    total += static_cast<int64_t>(part[w]);
  }
  block.turn ^= 1;
  return before;
}

// Calls use(entry, rank) for every entry with keep(entry), rank by ascending latent; returns how many there are.
template <class Keep, class Use>
__device__ inline int64_t ranked(Block& block, RankShared& shared, const Entry* entries, int64_t count, int64_t m, Keep keep,
                                 Use use) {
  int64_t base = 0;
  for (int64_t first = 0; first < m; first += WINDOW) {
    const int words = static_cast<int>(m - first < WINDOW ? (m - first + 31) / 32 : WINDOW_WORDS);
    for (int w = threadIdx.x; w < words; w += RANK_THREADS) shared.word[w] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += RANK_THREADS) {
      const int64_t at = entry_latent(entries[i]) - first;
      if (at >= 0 && at < WINDOW && keep(entries[i])) atomicAdd(&shared.word[at / 32], 1u << (at % 32));  // each once
    }
    __syncthreads();
    int64_t done = base;
    for (int w0 = 0; w0 < words; w0 += RANK_THREADS) {
      const int w = w0 + static_cast<int>(threadIdx.x);
      int64_t total;
      const int64_t before = scan(block, w < words ? __popc(shared.word[w]) : 0, total);
      if (w < words) shared.before[w] = static_cast<int32_t>(done + before - base);
      done += total;
    }
    __syncthreads();
    if (done > base) {
      for (int64_t i = threadIdx.x; i < count; i += RANK_THREADS) {
        const int64_t at = entry_latent(entries[i]) - first;
        if (at >= 0 && at < WINDOW && keep(entries[i])) {
          const uint32_t lower = shared.word[at / 32] & ((1u << (at % 32)) - 1);
          use(entries[i], base + shared.before[at / 32] + __popc(lower));
        }
      }
    }
    __syncthreads();
    base = done;
  }
  return base;
}

// --- pools -----------------------------------------------------------------------------------------------------------

// Every found entry to its row's part of `entries`.
__global__ void __launch_bounds__(256) place_found(Pool pool, const int64_t* place) {
  const int64_t total = *pool.total < pool.cap ? *pool.total : pool.cap;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const Found f = pool.found[i];
    const int64_t to = place[f.row] + f.slot;
    if (to < pool.cap) pool.entries[to] = entry_of(f.pre, f.latent);
  }
}

// out[i] = the sum of the counts before i, for i = 0..n. One block.
__global__ void __launch_bounds__(1024) sum_counts(const int32_t* count, int64_t n, int64_t* out) {
  Block block{reinterpret_cast<Exchange*>(shared_memory()), static_cast<int>(blockDim.x), 0};
  int64_t base = 0;
  for (int64_t first = 0; first < n; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    int64_t total;
    const int64_t before = scan(block, i < n ? count[i] : 0, total);
    if (i < n) out[i] = base + before;
    base += total;
  }
  if (threadIdx.x == 0) out[n] = base;
}

__global__ void __launch_bounds__(256) clear_pool(Pool pool, int64_t n, const int32_t* run) {
  if (run && *run == 0) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i == 0) *pool.total = 0;
  if (i < n) pool.count[i] = 0;
}

// --- thresholds --------------------------------------------------------------------------------------------------------

// Whether the pool was too small: a flag behind the counts of the second pass.
__global__ void __launch_bounds__(32) threshold_again(Pool pool, int32_t* flag) {
  if (threadIdx.x == 0) *flag = *pool.total > pool.cap;
}

template <class T>
__global__ void __launch_bounds__(RANK_THREADS) threshold_rows(EncodeInput in, const float* threshold, float half,
                                                               const Entry* entries, const int64_t* offsets,
                                                               T* values, int32_t* indices, uint8_t* state, int64_t capacity) {
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_memory());
  Block block{&shared.exchange, RANK_THREADS, 0};
  const int64_t row = blockIdx.x, first = offsets[row], count = offsets[row + 1] - first;
  if (count == 0 || first >= capacity) return;
  const Scoring scoring{in.norms, in.magnitude};
  ranked(
      block, shared, entries + first, count, in.m, [](Entry) { return true; },
      [&](Entry entry, int64_t rank) {
        const int64_t to = first + rank;
        if (to >= capacity) return;
        const int32_t latent = entry_latent(entry);
        const float pre = entry_pre(entry), limit = threshold[latent];
        const float score = score_of(pre, scoring.norms ? scoring.norms[latent] : 1.0f, scoring.magnitude);
        const bool above = !(score <= limit), near = fabsf(pre - limit) < half;
        values[to] = from_float<T>(above ? pre : 0.0f);
        indices[to] = latent;
        if (state) state[to] = static_cast<uint8_t>((above ? 1 : 0) + (near ? 2 : 0));
      });
}

// --- the best of a batch -----------------------------------------------------------------------------------------------

// One thread: what is looked for among the sampled scores, and then among all of them.
__global__ void __launch_bounds__(32) batch_begin(BatchState* state, int64_t wanted, int64_t rank, int64_t n) {
  if (threadIdx.x != 0) return;
  state->wanted = wanted;
  state->left = rank;
  state->prefix = 0;
  state->failed = 0;
  state->last_row = static_cast<int32_t>(n);
  state->tie_latent = INT32_MAX;
  state->smallest = bits_float(0x7f800000u);
}

// After the gate: a pool that does not hold all that is wanted, or not all that passed, proves nothing.
__global__ void __launch_bounds__(256) batch_certify(BatchState* state, Pool pool, int32_t* equal, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) equal[i] = 0;
  if (i != 0) return;
  state->failed = *pool.total < state->wanted || *pool.total > pool.cap;
  state->left = state->wanted;
  state->prefix = 0;
}

__global__ void __launch_bounds__(256) clear_bins(int64_t* bins) { bins[threadIdx.x] = 0; }

// Counts, by the digit above `shift`, the scores of a list that begin as the prefix does; `shift` < 0: those that equal
// it, by row. The list: sampled scores, or the entries of a certified pool.
__global__ void __launch_bounds__(256) count_list(const float* scores, int64_t length, Pool pool, EncodeInput in,
                                                  const BatchState* state, int64_t* bins, int shift, int32_t* equal) {
  if (!scores && state->failed) return;
  int* const found = reinterpret_cast<int*>(shared_memory());  // [256]
  found[threadIdx.x] = 0;
  __syncthreads();
  if (!scores) length = *pool.total;
  const Scoring scoring{in.norms, in.magnitude};
  const uint32_t prefix = state->prefix;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < length;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint32_t key;
    if (scores) {
      key = order_bits(scores[i]);
    } else {
      const Found& f = pool.found[i];
      key = order_bits(score_of(f.pre, scoring.norms ? scoring.norms[f.latent] : 1.0f, scoring.magnitude));
    }
    if (shift < 0) {
      if (key == prefix) atomicAdd(equal + pool.found[i].row, 1);
    } else if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) {
      atomicAdd(&found[key >> shift & 255u], 1);
    }
  }
  if (shift < 0) return;
  __syncthreads();
  if (found[threadIdx.x])
    atomicAdd(reinterpret_cast<unsigned long long*>(bins) + threadIdx.x, static_cast<unsigned long long>(found[threadIdx.x]));
}

// The next digit of the pivot: that of the `left`-th largest. One block of 256.
__global__ void __launch_bounds__(256) pick_digit(BatchState* state, int64_t* bins, int shift) {
  Block block{reinterpret_cast<Exchange*>(shared_memory()), 256, 0};
  const int digit = 255 - static_cast<int>(threadIdx.x);
  const int64_t mine = bins[digit], left = state->left;
  int64_t total;
  const int64_t above = scan(block, mine, total);
  __syncthreads();
  bins[digit] = 0;
  if (above < left && left <= above + mine) {
    state->prefix |= static_cast<uint32_t>(digit) << shift;
    state->left = left - above;
  }
}

// The row in which the last of the entries that equal the pivot lies: rows take them in order. One block.
__global__ void __launch_bounds__(1024) batch_last_row(BatchState* state, const int32_t* equal, int64_t n) {
  Block block{reinterpret_cast<Exchange*>(shared_memory()), static_cast<int>(blockDim.x), 0};
  const int64_t left = state->left;
  int64_t base = 0;
  __syncthreads();
  for (int64_t first = 0; first < n; first += blockDim.x) {
    const int64_t i = first + threadIdx.x, mine = i < n ? equal[i] : 0;
    int64_t total;
    const int64_t before = base + scan(block, mine, total);
    if (before < left && left <= before + mine) {
      state->last_row = static_cast<int32_t>(i);
      state->left = left - before;  // of that row
    }
    base += total;
  }
}

__device__ __forceinline__ bool batch_takes(const BatchState& state, int64_t row, Entry entry, const Scoring& scoring) {
  const uint32_t key = static_cast<uint32_t>(entry_key(entry, scoring) >> 32);
  if (key != state.prefix) return key > state.prefix;
  return row < state.last_row || (row == state.last_row && entry_latent(entry) <= state.tie_latent);
}

// The last latent of that row that is taken. One block.
__global__ void __launch_bounds__(RANK_THREADS) batch_tie(BatchState* state, EncodeInput in, Pool pool, const int64_t* place) {
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_memory());
  Block block{&shared.exchange, RANK_THREADS, 0};
  const int64_t row = state->last_row, left = state->left;
  if (row >= in.n) return;
  const uint32_t pivot = state->prefix;
  const Scoring scoring{in.norms, in.magnitude};
  ranked(
      block, shared, pool.entries + place[row], place[row + 1] - place[row], in.m,
      [&](Entry e) { return static_cast<uint32_t>(entry_key(e, scoring) >> 32) == pivot; },
      [&](Entry e, int64_t rank) {
        if (rank == left - 1) state->tie_latent = entry_latent(e);
      });
}

// How many entries of every row are selected; a ReLU leaves out what is at or below 0.
__global__ void __launch_bounds__(128) batch_count(const BatchState* state, EncodeInput in, Pool pool, const int64_t* place,
                                                   bool relu, int32_t* count) {
  Block block{reinterpret_cast<Exchange*>(shared_memory()), static_cast<int>(blockDim.x), 0};
  const int64_t row = blockIdx.x, first = place[row], entries = place[row + 1] - first;
  const Scoring scoring{in.norms, in.magnitude};
  uint64_t taken = 0;
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    const Entry e = pool.entries[first + i];
    taken += batch_takes(*state, row, e, scoring) && !(relu && entry_pre(e) <= 0.0f);
  }
  taken = block.sum(taken);
  if (threadIdx.x == 0) count[row] = static_cast<int32_t>(taken);
}

template <class T>
__global__ void __launch_bounds__(RANK_THREADS) batch_rows(BatchState* state, EncodeInput in, Pool pool, const int64_t* place,
                                                           bool relu, const int64_t* offsets, T* values, int32_t* indices) {
  RankShared& shared = *reinterpret_cast<RankShared*>(shared_memory());
  Block block{&shared.exchange, RANK_THREADS, 0};
  const int64_t row = blockIdx.x, first = place[row], to = offsets[row];
  if (offsets[row + 1] == to) return;
  const Scoring scoring{in.norms, in.magnitude};
  const BatchState batch = *state;
  ranked(
      block, shared, pool.entries + first, place[row + 1] - first, in.m,
      [&](Entry e) { return batch_takes(batch, row, e, scoring) && !(relu && entry_pre(e) <= 0.0f); },
      [&](Entry e, int64_t rank) {
        const int32_t latent = entry_latent(e);
        const float pre = entry_pre(e);
        values[to + rank] = from_float<T>(pre);
        indices[to + rank] = latent;
        const float score = score_of(pre, scoring.norms ? scoring.norms[latent] : 1.0f, scoring.magnitude);
        if (score > 0.0f) atomicMin(reinterpret_cast<int*>(&state->smallest), static_cast<int>(float_bits(score)));
      });
}

}  // namespace fusae::cuda
