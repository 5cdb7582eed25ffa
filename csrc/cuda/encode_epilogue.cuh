// SPDX-License-Identifier: Apache-2.0
// What becomes of a tile of products while it is in registers: the same for every GEMM and every encoder.
//
// A team of threads has a tile; a thread has MB x NB blocks of 2 x 2 products, at rows +0 and +8, columns +0 and +1 of
// its place: what the tensor cores leave (wgmma m64nNk16 and mma m16n8 alike). An epilogue has
//   begin(row0, column0)   ahead of the products: what the rows and columns of the tile bring
//   finish(acc)            with the products
// Hits are few (0.4 % for a top-k), so the scan of the products only writes them to a list in shared memory; then the
// team's threads take the list, one hit each, and wait for global memory together. What the list can't hold, its
// finder appends himself: a list is no limit.
#pragma once
#include "cuda/common.cuh"
#include "cuda/encode_keys.cuh"
#include "cuda/encode_ptx.cuh"

namespace fusae::cuda {

constexpr int LIST = 512;
constexpr int SECOND = 0x8000;  // in the column of a listed hit: it is one of the second selection

template <int COLUMNS>
struct TeamShared {
  float bias[COLUMNS], scale[COLUMNS], third[COLUMNS];
  uint2 list[2][LIST];  // row << 16 | column within the tile, bits of the pre-activation
  int count[4];         // three in turn: one in use, one being read, one being cleared
};

template <int MB_, int NB_, int COLUMNS_, int THREADS_>
struct Team {
  static constexpr int MB = MB_, NB = NB_, COLUMNS = COLUMNS_, THREADS = THREADS_;
  TeamShared<COLUMNS>* shared;
  int thread;       // in the team
  int row, column;  // the thread's place in the tile
  int barrier;      // number of the team's barrier
  __device__ __forceinline__ void sync() const { named_barrier(barrier, THREADS); }
};

// Columns of a tile in shared memory: bias, and what the score is multiplied with. `sync` before they are read.
template <class T>
__device__ __forceinline__ void stage_columns(const T& team, const EncodeInput& in, int64_t column0, const float* third,
                                              const uint8_t* mask) {
  for (int c = team.thread; c < T::COLUMNS; c += T::THREADS) {
    const int64_t column = column0 + c < in.m ? column0 + c : in.m - 1;
    team.shared->bias[c] = in.bias ? in.bias[column] : 0.0f;
    team.shared->scale[c] = in.norms ? in.norms[column] : 1.0f;
    team.shared->third[c] = third ? third[column] : mask ? static_cast<float>(mask[column]) : 1.0f;
  }
}

// --- the sample ----------------------------------------------------------------------------------------------------

struct StoreArgs {
  float* scores;  // [n, size]
  int64_t size;
  int32_t step;
};

template <class T>
struct StoreScores {
  using Args = StoreArgs;
  static constexpr bool SAMPLED = true;
  const EncodeInput& in;
  const Args& args;
  T team;
  int64_t row0, column0;

  __device__ StoreScores(const EncodeInput& in_, const Args& args_, const T& team_)
      : in(in_), args(args_), team(team_), row0(0), column0(0) {}
  __device__ __forceinline__ int64_t columns() const { return args.size; }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();  // the columns of the tile before were read
    for (int c = team.thread; c < T::COLUMNS; c += T::THREADS) {
      const int32_t j = static_cast<int32_t>(column0 + c < args.size ? column0 + c : args.size - 1);
      const int32_t latent = sampled_latent(j, args.step);
      team.shared->bias[c] = in.bias ? in.bias[latent] : 0.0f;
      team.shared->scale[c] = in.norms ? in.norms[latent] : 1.0f;
    }
  }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    team.sync();
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
      const int c = team.column + 8 * j;
      if (column0 + c >= args.size) continue;  // sizes are even
#pragma unroll
      for (int i = 0; i < T::MB; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = row0 + team.row + 16 * i + 8 * h;
          if (row >= in.n) continue;
          float2 out;
          out.x = score_of(acc[i][j][2 * h] + team.shared->bias[c], team.shared->scale[c], in.magnitude);
          out.y = score_of(acc[i][j][2 * h + 1] + team.shared->bias[c + 1], team.shared->scale[c + 1], in.magnitude);
          *reinterpret_cast<float2*>(args.scores + row * args.size + column0 + c) = out;
        }
      }
    }
  }
};

// --- lists of hits -------------------------------------------------------------------------------------------------

// `Derived` appends: append(row, latent, pre, second) one hit, at any place of the code; take(hit, ...) one of a list,
// by whole warps (`hit` is false in lanes that have none).
template <class T, class Derived>
struct Listed {
  const EncodeInput& in;
  T team;
  int64_t row0, column0;
  int turn;

  __device__ Listed(const EncodeInput& in_, const T& team_) : in(in_), team(team_), row0(0), column0(0), turn(0) {
    if (team.thread < 4) team.shared->count[team.thread] = 0;  // `finish` begins with a barrier
  }
  __device__ __forceinline__ void push(int row, int column, float pre) {
    const int64_t r = row0 + row, c = column0 + (column & ~SECOND);
    if (r >= in.n || c >= in.m) return;  // products with the zeros around the matrices
    const int slot = atomicAdd(&team.shared->count[turn % 3], 1);
    if (slot < LIST) {
      team.shared->list[turn & 1][slot] =
          uint2{static_cast<uint32_t>(row) << 16 | static_cast<uint32_t>(column), float_bits(pre)};
    } else {
      static_cast<Derived*>(this)->append(r, static_cast<int32_t>(c), pre, (column & SECOND) != 0);
    }
  }
  __device__ __forceinline__ void flush() {
    team.sync();
    const int listed = team.shared->count[turn % 3];
    if (team.thread == 0) team.shared->count[(turn + 2) % 3] = 0;
    const int count = listed < LIST ? listed : LIST;
    for (int i = team.thread; i / 32 * 32 < count; i += T::THREADS) {
      const uint2 hit = i < count ? team.shared->list[turn & 1][i] : uint2{0, 0};
      const int column = static_cast<int>(hit.x & 0xffff);
      static_cast<Derived*>(this)->take(i < count, row0 + (hit.x >> 16), static_cast<int32_t>(column0 + (column & ~SECOND)),
                                        bits_float(hit.y), (column & SECOND) != 0);
    }
    ++turn;
  }
};

// --- top-k ---------------------------------------------------------------------------------------------------------

struct Bounds {
  const float* bound;
  const int32_t* last;
  int32_t* tally;
  Entry* entries;
  int cap;
};

struct GateTopkArgs {
  Bounds main, aux;  // aux.cap == 0: none
  const uint8_t* mask;       // of main
  const uint8_t* aux_mask;
};

template <class T>
struct GateTopk : Listed<T, GateTopk<T>> {
  using Args = GateTopkArgs;
  static constexpr bool SAMPLED = false;
  using Base = Listed<T, GateTopk<T>>;
  const Args& args;
  float least[T::MB][2], aux_least[T::MB][2];

  __device__ GateTopk(const EncodeInput& in_, const Args& args_, const T& team_) : Base(in_, team_), args(args_) {}
  __device__ __forceinline__ int64_t columns() const { return Base::in.m; }
  __device__ __forceinline__ float least_of(const Bounds& b, int64_t row) const {
    return row < Base::in.n ? least_score(b.bound[row], b.last[row], Base::column0) : bits_float(0x7f800000u);
  }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    Base::row0 = row;
    Base::column0 = column;
#pragma unroll
    for (int i = 0; i < T::MB; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = row + Base::team.row + 16 * i + 8 * h;
        least[i][h] = least_of(args.main, r);
        aux_least[i][h] = args.aux.cap ? least_of(args.aux, r) : 0.0f;
      }
    }
    stage_columns(Base::team, Base::in, column, nullptr, args.aux.cap ? args.aux_mask : args.mask);
  }
  __device__ __forceinline__ void append(int64_t row, int32_t latent, float pre, bool second) const {
    const Bounds& b = second ? args.aux : args.main;
    const int slot = atomicAdd(b.tally + row, 1);  // counted beyond the buffer's end too
    if (slot < b.cap) b.entries[row * b.cap + slot] = entry_of(pre, latent);
  }
  __device__ __forceinline__ void take(bool hit, int64_t row, int32_t latent, float pre, bool second) const {
    if (hit) append(row, latent, pre, second);
  }
  // The scan of almost every call: four additions, four comparisons and a branch for four products.
  __device__ __forceinline__ void scan_plain(const float (&acc)[T::MB][T::NB][4]) {
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
      const int c = Base::team.column + 8 * j;
      const float2 bias = *reinterpret_cast<const float2*>(Base::team.shared->bias + c);
#pragma unroll
      for (int i = 0; i < T::MB; ++i) {
        const float a = acc[i][j][0] + bias.x, b = acc[i][j][1] + bias.y;
        const float e = acc[i][j][2] + bias.x, f = acc[i][j][3] + bias.y;
        // Not "a >= least": NaN passes.
        if (!(a < least[i][0]) || !(b < least[i][0]) || !(e < least[i][1]) || !(f < least[i][1])) {
          const int r = Base::team.row + 16 * i;
          if (!(a < least[i][0])) Base::push(r, c, a);
          if (!(b < least[i][0])) Base::push(r, c + 1, b);
          if (!(e < least[i][1])) Base::push(r + 8, c, e);
          if (!(f < least[i][1])) Base::push(r + 8, c + 1, f);
        }
      }
    }
  }
  __device__ __forceinline__ void scan(const float (&acc)[T::MB][T::NB][4]) {
    const bool second = args.aux.cap != 0, masked = args.mask != nullptr;
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = Base::team.column + 8 * j + e;
        const float bias = Base::team.shared->bias[c], scale = Base::team.shared->scale[c];
        const bool in_mask = Base::team.shared->third[c] != 0.0f;
#pragma unroll
        for (int i = 0; i < T::MB; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float pre = acc[i][j][2 * h + e] + bias, score = score_of(pre, scale, Base::in.magnitude);
            const int r = Base::team.row + 16 * i + 8 * h;
            if (!(score < least[i][h]) && (!masked || in_mask)) Base::push(r, c, pre);
            if (second && in_mask && !(score < aux_least[i][h])) Base::push(r, c | SECOND, pre);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    Base::team.sync();
    if (!Base::in.norms && !Base::in.magnitude && !args.aux.cap && !args.mask) {
      scan_plain(acc);
    } else {
      scan(acc);
    }
    Base::flush();
  }
};

// --- ragged --------------------------------------------------------------------------------------------------------

struct GateRaggedArgs {
  const float* threshold;   // [m], or null: by `state`
  float half;
  int32_t* above;           // [n] or null
  const BatchState* state;
  Pool pool;
  const int64_t* offsets;   // with it, only rows that begin before `capacity`
  int64_t capacity;
};

template <class T>
struct GateRagged : Listed<T, GateRagged<T>> {
  using Args = GateRaggedArgs;
  static constexpr bool SAMPLED = false;
  using Base = Listed<T, GateRagged<T>>;
  const Args& args;
  float pivot;

  __device__ GateRagged(const EncodeInput& in_, const Args& args_, const T& team_) : Base(in_, team_), args(args_) {
    // As a float it lets pass a little too much (NaN: +Inf too); `append` has the last word.
    pivot = args.state ? from_order_bits(args.state->prefix) : 0.0f;
    if (pivot != pivot) pivot = bits_float(0x7f800000u);
  }
  __device__ __forceinline__ int64_t columns() const { return Base::in.m; }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    Base::row0 = row;
    Base::column0 = column;
    stage_columns(Base::team, Base::in, column, args.threshold, nullptr);
  }
  // The last word on a hit; counts what is above its threshold.
  __device__ __forceinline__ bool accept(int64_t row, int32_t latent, float pre) const {
    const float score = score_of(pre, Base::in.norms ? Base::in.norms[latent] : 1.0f, Base::in.magnitude);
    if (args.state) {
      const uint32_t key = order_bits(score);
      return key > args.state->prefix || (key == args.state->prefix && row <= args.state->last_row);
    }
    if (args.offsets && args.offsets[row] >= args.capacity) return false;
    if (args.above && !(score <= args.threshold[latent])) atomicAdd(args.above + row, 1);
    return true;
  }
  __device__ __forceinline__ void put_found(int64_t place, int64_t row, int32_t latent, float pre) const {
    const int slot = atomicAdd(args.pool.count + row, 1);
    if (place < args.pool.cap) args.pool.found[place] = Found{static_cast<int32_t>(row), latent, slot, pre};
  }
  __device__ __forceinline__ int64_t reserve(int count) const {
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(args.pool.total),
                                          static_cast<unsigned long long>(count)));
  }
  __device__ __forceinline__ void append(int64_t row, int32_t latent, float pre, bool) const {
    if (accept(row, latent, pre)) put_found(reserve(1), row, latent, pre);
  }
  // One addition to the pool's only counter for a warp.
  __device__ __forceinline__ void take(bool hit, int64_t row, int32_t latent, float pre, bool) const {
    const bool taken = hit && accept(row, latent, pre);
    const unsigned votes = __ballot_sync(0xffffffffu, taken), lane = static_cast<unsigned>(Base::team.thread) % 32;
    if (!votes) return;
    int64_t first = 0;
    if (lane == 0) first = reserve(__popc(votes));
    first = __shfl_sync(0xffffffffu, first, 0);
    if (taken) put_found(first + __popc(votes & ((1u << lane) - 1)), row, latent, pre);
  }
  template <bool BATCH>
  __device__ __forceinline__ void scan(const float (&acc)[T::MB][T::NB][4]) {
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = Base::team.column + 8 * j + e;
        const float bias = Base::team.shared->bias[c], scale = Base::team.shared->scale[c];
        const float limit = Base::team.shared->third[c];
#pragma unroll
        for (int i = 0; i < T::MB; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float pre = acc[i][j][2 * h + e] + bias, score = score_of(pre, scale, Base::in.magnitude);
            const bool hit = BATCH ? !(score < pivot) : !(score <= limit) || fabsf(pre - limit) < args.half;
            if (hit) Base::push(Base::team.row + 16 * i + 8 * h, c, pre);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    Base::team.sync();
    if (args.state) {
      scan<true>(acc);
    } else {
      scan<false>(acc);
    }
    Base::flush();
  }
};

// --- the best of every group ---------------------------------------------------------------------------------------

struct GroupMaxPass {
  Entry* best;   // [n, k] keys, 0 at first
  float* pre;    // [n, k] or null: write the pre-activations of the best instead
  int64_t k, size;
};

template <class T>
struct GroupMax {
  using Args = GroupMaxPass;
  static constexpr bool SAMPLED = false;
  const EncodeInput& in;
  const Args& args;
  T team;
  int64_t row0, column0;

  __device__ GroupMax(const EncodeInput& in_, const Args& args_, const T& team_)
      : in(in_), args(args_), team(team_), row0(0), column0(0) {}
  __device__ __forceinline__ int64_t columns() const { return in.m; }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();
    stage_columns(team, in, column, nullptr, nullptr);
  }
  __device__ __forceinline__ void give(int64_t row, int64_t group, uint64_t key) const {
    Entry* const at = args.best + row * args.k + group;
    if (key > *const_cast<const volatile Entry*>(at)) atomicMax(at, static_cast<Entry>(key));
  }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    team.sync();
#pragma unroll
    for (int i = 0; i < T::MB; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = row0 + team.row + 16 * i + 8 * h;
        int64_t group = (column0 + team.column) / args.size, end = (group + 1) * args.size;
        uint64_t best = 0;
#pragma unroll
        for (int j = 0; j < T::NB; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = team.column + 8 * j + e;
            const int64_t latent = column0 + c;
            if (row >= in.n || latent >= in.m) continue;
            while (latent >= end) {  // columns ascend
              if (best) give(row, group, best);
              best = 0;
              ++group;
              end += args.size;
            }
            const float pre = acc[i][j][2 * h + e] + team.shared->bias[c];
            if (args.pre) {
              if (key_latent(args.best[row * args.k + group]) == latent) args.pre[row * args.k + group] = pre;
            } else {
              const uint64_t key = key_of(score_of(pre, team.shared->scale[c], in.magnitude), static_cast<int32_t>(latent));
              best = key > best ? key : best;
            }
          }
        }
        if (best) give(row, group, best);
      }
    }
  }
};

// --- how many ------------------------------------------------------------------------------------------------------

// Where a batch could not be certified: its scores counted by a digit, or those that equal the pivot by row.
struct CountArgs {
  const BatchState* state;
  int64_t* bins;   // [256], of the digit above `shift`
  int shift;       // < 0: equal
  int32_t* equal;  // [n]
};

template <class T>
struct CountScores {
  using Args = CountArgs;
  static constexpr bool SAMPLED = false;
  const EncodeInput& in;
  const Args& args;
  T team;
  int64_t row0, column0;
  uint32_t prefix;

  __device__ CountScores(const EncodeInput& in_, const Args& args_, const T& team_)
      : in(in_), args(args_), team(team_), row0(0), column0(0), prefix(args_.state->prefix) {}
  __device__ __forceinline__ int64_t columns() const { return in.m; }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();
    stage_columns(team, in, column, nullptr, nullptr);
    for (int b = team.thread; b < 256; b += T::THREADS) bins()[b] = 0;
  }
  __device__ __forceinline__ int* bins() const { return reinterpret_cast<int*>(team.shared->list); }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    team.sync();
    const int above = args.shift + 8;
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = team.column + 8 * j + e;
        if (column0 + c >= in.m) continue;
#pragma unroll
        for (int i = 0; i < T::MB; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int64_t row = row0 + team.row + 16 * i + 8 * h;
            if (row >= in.n) continue;
            const float pre = acc[i][j][2 * h + e] + team.shared->bias[c];
            const uint32_t key = order_bits(score_of(pre, team.shared->scale[c], in.magnitude));
            if (args.shift < 0) {
              if (key == prefix) atomicAdd(args.equal + row, 1);
            } else if (above == 32 || key >> above == prefix >> above) {
              atomicAdd(bins() + (key >> args.shift & 255u), 1);
            }
          }
        }
      }
    }
    if (args.shift < 0) return;
    team.sync();
    for (int b = team.thread; b < 256; b += T::THREADS) {
      if (bins()[b]) atomicAdd(reinterpret_cast<unsigned long long*>(args.bins) + b, static_cast<unsigned long long>(bins()[b]));
    }
  }
};

}  // namespace fusae::cuda
