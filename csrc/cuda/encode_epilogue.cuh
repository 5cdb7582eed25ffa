// SPDX-License-Identifier: Apache-2.0
// What becomes of a tile of products while it is in registers: the same for every GEMM and every encoder.
//
// A team of threads has a tile; a thread has MB x NB blocks of 2 x 2 products, at rows +0 and +8, columns +0 and +1 of
// its place: what the tensor cores leave (wgmma m64nNk16 and mma m16n8 alike). An epilogue has
//   begin(row0, column0)   ahead of the products: what the rows and columns of the tile bring
//   finish(acc)            with the products
// Hits are few (0.4 % for a top-k). So the scan of the products only marks blocks of four in which there may be one, and
// writes those to a list in shared memory; then the team's threads take the list, look closely, and wait for global
// memory together. Blocks that a full list has no room for wait for the next round: a list is no limit. (Appending in
// the scan itself, 128 times unrolled, made 280 KB of instructions.)
#pragma once
#include "cuda/common.cuh"
#include "cuda/encode_keys.cuh"
#include "cuda/encode_ptx.cuh"

namespace fusae::cuda {

constexpr int LIST = 256;  // blocks of four products

template <int COLUMNS>
struct TeamShared {
  float bias[2][COLUMNS], scale[2][COLUMNS], third[2][COLUMNS];  // of this tile and of the one before
  float4 list[2][LIST];  // products without the bias: (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
  int place[2][LIST];    // r << 16 | c, within the tile
  int count[4];          // three in turn: one in use, one being read, one being cleared
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
__device__ __forceinline__ void stage_columns(const T& team, int side, const EncodeInput& in, int64_t column0,
                                              const float* third, const uint8_t* mask) {
  for (int c = team.thread; c < T::COLUMNS; c += T::THREADS) {
    const int64_t column = column0 + c < in.m ? column0 + c : in.m - 1;
    team.shared->bias[side][c] = in.bias ? in.bias[column] : 0.0f;
    team.shared->scale[side][c] = in.norms ? in.norms[column] : 1.0f;
    team.shared->third[side][c] = third ? third[column] : mask ? static_cast<float>(mask[column]) : 1.0f;
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
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();  // the columns of the tile before were read
    for (int c = team.thread; c < T::COLUMNS; c += T::THREADS) {
      const int32_t j = static_cast<int32_t>(column0 + c < args.size ? column0 + c : args.size - 1);
      const int32_t latent = sampled_latent(j, args.step);
      team.shared->bias[0][c] = in.bias ? in.bias[latent] : 0.0f;
      team.shared->scale[0][c] = in.norms ? in.norms[latent] : 1.0f;
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
          out.x = score_of(acc[i][j][2 * h] + team.shared->bias[0][c], team.shared->scale[0][c], in.magnitude);
          out.y = score_of(acc[i][j][2 * h + 1] + team.shared->bias[0][c + 1], team.shared->scale[0][c + 1], in.magnitude);
          *reinterpret_cast<float2*>(args.scores + row * args.size + column0 + c) = out;
        }
      }
    }
  }
};

// --- lists of hits -------------------------------------------------------------------------------------------------

// `Derived` has
//   stage()                     what the rows and columns of the tile at (row0, column0) bring
//   may_hit(i, c, four)         whether one of four products may be a hit
//   take(inside, row, c, pre)   one of a listed block, by whole warps; if it isn't `inside` the matrix, nothing
template <class T, class Derived>
struct Listed {
  static constexpr bool SAMPLED = false;
  const EncodeInput& in;
  T team;
  int64_t row0, column0;
  int turn, side;

  __device__ Listed(const EncodeInput& in_, const T& team_)
      : in(in_), team(team_), row0(0), column0(0), turn(0), side(1) {
    if (team.thread < 4) team.shared->count[team.thread] = 0;  // `finish` begins with a barrier
  }
  __device__ __forceinline__ Derived& derived() { return *static_cast<Derived*>(this); }
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    side ^= 1;  // threads may still be busy with the list of the tile before
    derived().stage();
  }
  __device__ __forceinline__ void finish(const float (&acc)[T::MB][T::NB][4]) {
    team.sync();
    static_assert(T::MB * T::NB <= 32, "a bit for every block");
    unsigned waiting = 0;
#pragma unroll
    for (int j = 0; j < T::NB; ++j) {
#pragma unroll
      for (int i = 0; i < T::MB; ++i)
        waiting |= derived().may_hit(i, team.column + 8 * j, acc[i][j]) ? 1u << (i * T::NB + j) : 0u;
    }
    int listed;
    do {
      if (waiting) {
#pragma unroll
        for (int j = 0; j < T::NB; ++j) {
#pragma unroll
          for (int i = 0; i < T::MB; ++i) {
            if (!(waiting >> (i * T::NB + j) & 1u)) continue;
            const int slot = atomicAdd(&team.shared->count[turn % 3], 1);
            if (slot >= LIST) continue;
            waiting &= ~(1u << (i * T::NB + j));
            team.shared->list[turn & 1][slot] = float4{acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]};
            team.shared->place[turn & 1][slot] = (team.row + 16 * i) << 16 | (team.column + 8 * j);
          }
        }
      }
      team.sync();
      listed = team.shared->count[turn % 3];
      if (team.thread == 0) team.shared->count[(turn + 2) % 3] = 0;
      take_list(listed < LIST ? listed : LIST);
      ++turn;
    } while (listed > LIST);
  }
  __device__ __forceinline__ void take_list(int count) {
#pragma unroll 1
    for (int i = team.thread; i / 32 * 32 < count; i += T::THREADS) {
      const bool mine = i < count;
      const float4 four = mine ? team.shared->list[turn & 1][i] : float4{0.0f, 0.0f, 0.0f, 0.0f};
      const int place = mine ? team.shared->place[turn & 1][i] : 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = row0 + (place >> 16) + e / 2 * 8;
        const int c = (place & 0xffff) + e % 2;
        // Outside there are products with the zeros around the matrices.
        const bool inside = mine && row < in.n && column0 + c < in.m;
        derived().take(inside, row, c, (e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w) + team.shared->bias[side][c]);
      }
    }
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
  using Base = Listed<T, GateTopk<T>>;
  const Args& args;
  float least[T::MB][2], aux_least[T::MB][2];
  bool plain;

  __device__ GateTopk(const EncodeInput& in_, const Args& args_, const T& team_)
      : Base(in_, team_), args(args_), plain(!in_.norms && !in_.magnitude && !args_.aux.cap) {}
  __device__ __forceinline__ float least_of(const Bounds& b, int64_t row) const {
    return row < Base::in.n ? least_score(b.bound[row], b.last[row], Base::column0) : bits_float(0x7f800000u);
  }
  __device__ __forceinline__ void stage() {
#pragma unroll
    for (int i = 0; i < T::MB; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t r = Base::row0 + Base::team.row + 16 * i + 8 * h;
        least[i][h] = least_of(args.main, r);
        aux_least[i][h] = args.aux.cap ? least_of(args.aux, r) : 0.0f;
      }
    }
    stage_columns(Base::team, Base::side, Base::in, Base::column0, nullptr, args.aux.cap ? args.aux_mask : args.mask);
  }
  __device__ __forceinline__ bool may_hit(int i, int c, const float (&four)[4]) const {
    const float2 bias = *reinterpret_cast<const float2*>(Base::team.shared->bias[Base::side] + c);
    const float a = four[0] + bias.x, b = four[1] + bias.y, e = four[2] + bias.x, f = four[3] + bias.y;
    // Not "a >= least": NaN passes.
    if (plain) return !(a < least[i][0]) || !(b < least[i][0]) || !(e < least[i][1]) || !(f < least[i][1]);
    const float2 scale = *reinterpret_cast<const float2*>(Base::team.shared->scale[Base::side] + c);
    const bool magnitude = Base::in.magnitude;
    const float p = score_of(a, scale.x, magnitude), q = score_of(b, scale.y, magnitude);
    const float r = score_of(e, scale.x, magnitude), s = score_of(f, scale.y, magnitude);
    const bool main = !(p < least[i][0]) || !(q < least[i][0]) || !(r < least[i][1]) || !(s < least[i][1]);
    if (!args.aux.cap) return main;
    const float2 mask = *reinterpret_cast<const float2*>(Base::team.shared->third[Base::side] + c);
    const bool left = mask.x != 0.0f, right = mask.y != 0.0f;
    return main || (left && (!(p < aux_least[i][0]) || !(r < aux_least[i][1]))) ||
           (right && (!(q < aux_least[i][0]) || !(s < aux_least[i][1])));
  }
  __device__ __forceinline__ void append(const Bounds& b, int64_t row, int c, float pre) const {
    const int slot = atomicAdd(b.tally + row, 1);  // counted beyond the buffer's end too
    if (slot < b.cap) b.entries[row * b.cap + slot] = entry_of(pre, static_cast<int32_t>(Base::column0 + c));
  }
  __device__ __forceinline__ void take(bool inside, int64_t row, int c, float pre) const {
    if (!inside) return;
    const float score = score_of(pre, Base::team.shared->scale[Base::side][c], Base::in.magnitude);
    const bool in_mask = Base::team.shared->third[Base::side][c] != 0.0f;  // everything without one
    if ((!args.mask || in_mask) && !(score < least_of(args.main, row))) append(args.main, row, c, pre);
    if (args.aux.cap && in_mask && !(score < least_of(args.aux, row))) append(args.aux, row, c, pre);
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
  using Base = Listed<T, GateRagged<T>>;
  const Args& args;
  float pivot;

  __device__ GateRagged(const EncodeInput& in_, const Args& args_, const T& team_) : Base(in_, team_), args(args_) {
    // As a float it lets pass a little too much (NaN: +Inf too); `take` has the last word.
    pivot = args.state ? from_order_bits(args.state->prefix) : 0.0f;
    if (pivot != pivot) pivot = bits_float(0x7f800000u);
  }
  __device__ __forceinline__ void stage() {
    stage_columns(Base::team, Base::side, Base::in, Base::column0, args.threshold, nullptr);
  }
  __device__ __forceinline__ bool may_hit(int, int c, const float (&four)[4]) const {
    const auto& shared = *Base::team.shared;
    bool hit = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float pre = four[e] + shared.bias[Base::side][c + e % 2];
      const float score = score_of(pre, shared.scale[Base::side][c + e % 2], Base::in.magnitude);
      const float limit = shared.third[Base::side][c + e % 2];
      hit |= args.state ? !(score < pivot) : !(score <= limit) || fabsf(pre - limit) < args.half;
    }
    return hit;
  }
  // Counts what is above its threshold, too.
  __device__ __forceinline__ bool accept(int64_t row, int c, float pre) const {
    const float score = score_of(pre, Base::team.shared->scale[Base::side][c], Base::in.magnitude);
    if (args.state) {
      const uint32_t key = order_bits(score);
      return key > args.state->prefix || (key == args.state->prefix && row <= args.state->last_row);
    }
    if (args.offsets && args.offsets[row] >= args.capacity) return false;
    const float limit = Base::team.shared->third[Base::side][c];
    const bool above = !(score <= limit);
    if (args.above && above) atomicAdd(args.above + row, 1);
    return above || fabsf(pre - limit) < args.half;
  }
  // One addition to the pool's only counter for a warp.
  __device__ __forceinline__ void take(bool inside, int64_t row, int c, float pre) const {
    const bool taken = inside && accept(row, c, pre);
    const unsigned votes = __ballot_sync(0xffffffffu, taken), lane = static_cast<unsigned>(Base::team.thread) % 32;
    if (!votes) return;
    unsigned long long first = 0;
    if (lane == 0)
      first = atomicAdd(reinterpret_cast<unsigned long long*>(args.pool.total), static_cast<unsigned long long>(__popc(votes)));
    first = __shfl_sync(0xffffffffu, first, 0);
    if (!taken) return;
    const int64_t place = static_cast<int64_t>(first) + __popc(votes & ((1u << lane) - 1));
    const int slot = atomicAdd(args.pool.count + row, 1);
    if (place < args.pool.cap)
      args.pool.found[place] = Found{static_cast<int32_t>(row), static_cast<int32_t>(Base::column0 + c), slot, pre};
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
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();
    stage_columns(team, 0, in, column, nullptr, nullptr);
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
            const float pre = acc[i][j][2 * h + e] + team.shared->bias[0][c];
            if (args.pre) {
              if (key_latent(args.best[row * args.k + group]) == latent) args.pre[row * args.k + group] = pre;
            } else {
              const uint64_t key = key_of(score_of(pre, team.shared->scale[0][c], in.magnitude), static_cast<int32_t>(latent));
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
  __device__ __forceinline__ void begin(int64_t row, int64_t column) {
    row0 = row;
    column0 = column;
    team.sync();
    stage_columns(team, 0, in, column, nullptr, nullptr);
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
            const float pre = acc[i][j][2 * h + e] + team.shared->bias[0][c];
            const uint32_t key = order_bits(score_of(pre, team.shared->scale[0][c], in.magnitude));
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
