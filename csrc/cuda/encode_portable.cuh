// SPDX-License-Identifier: Apache-2.0
// The GEMM of the encoders on compute capability 8.0 and newer: tiles of 128 rows and 128 latents, cp.async in STAGES
// stages, mma.sync of 16-bit or TF32 operands, or float32 FMAs in the order of d. Also the repair everywhere, whose rows
// come from a list.
//
// A warp has 64 rows and 32 latents. A stage has 64 bytes of every row at a pitch of 80: the 8 rows that an ldmatrix (or
// a load of FMA operands) reads together lie in different banks.
#pragma once
#include "cuda/encode_epilogue.cuh"

namespace fusae::cuda {

struct Tf32 {
  float value;
};

namespace portable {

constexpr int ROWS = 128, COLUMNS = 128, THREADS = 256, STAGES = 3;
constexpr int WIDTH = 64, PITCH = 80;  // bytes of a row in a stage
constexpr int STAGE_BYTES = (ROWS + COLUMNS) * PITCH;

using Frame = Team<4, 4, COLUMNS, THREADS>;

struct Shared {
  unsigned char stage[STAGES][STAGE_BYTES];
  TeamShared<COLUMNS> team;
};
constexpr int SHARED_BYTES = static_cast<int>(sizeof(Shared));
static_assert(2 * (SHARED_BYTES + 1024) <= 164 * 1024, "two blocks on a multiprocessor of capability 8.0");

// What a thread copies of every stage: 16 bytes, at the same place in the row, of two rows and of two latents.
struct Sources {
  const unsigned char* row[4];  // null: zeros
};

__device__ __forceinline__ Frame frame_of(Shared& shared) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  return {&shared.team, thread, warp / 4 * 64 + lane / 4, warp % 4 * 32 + lane % 4 * 2, 1};
}

__device__ __forceinline__ void copy_stage(unsigned char* stage, const Sources& from, const void* anywhere, int64_t at,
                                           int64_t row_bytes) {
  const int thread = thread_index(), chunk = thread % 4 * 16;
  const int64_t left = row_bytes - at - chunk;
  const int bytes = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned char* const to = stage + (thread / 4 + 64 * i) * PITCH + chunk;
    const bool some = from.row[i] != nullptr && bytes > 0;
    copy_async(to, some ? from.row[i] + at + chunk : anywhere, some ? bytes : 0);
  }
}

template <class T>
__device__ __forceinline__ void multiply_stage(float (&acc)[4][4][4], const unsigned char* stage) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const unsigned char* const a = stage + warp / 4 * 64 * PITCH;
  const unsigned char* const b = stage + (ROWS + warp % 4 * 32) * PITCH;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int k = 0; k < WIDTH; k += 8) {
      float2 left[8], right[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = *reinterpret_cast<const float2*>(a + (lane / 4 + 8 * i) * PITCH + k);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        right[j] = *reinterpret_cast<const float2*>(b + (lane % 4 * 2 + j / 2 * 8 + j % 2) * PITCH + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& c = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
          c = fmaf(left[i].y, right[j].y, fmaf(left[i].x, right[j].x, c));
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < WIDTH; k += 32) {
      uint32_t left[4][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices(left[i], a + (16 * i + lane % 16) * PITCH + k + lane / 16 * 16);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices(right[j], b + (16 * j + lane / 16 * 8 + lane % 8) * PITCH + k + lane / 8 % 2 * 16);
      if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) left[i][e] = round_tf32(left[i][e]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) right[j][e] = round_tf32(right[j][e]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t b0 = right[j / 2][j % 2 * 2], b1 = right[j / 2][j % 2 * 2 + 1];
          if constexpr (std::is_same_v<T, Tf32>) {
            mma_tf32(acc[i][j], left[i], b0, b1);
          } else if constexpr (std::is_same_v<T, bf16>) {
            mma_bf16(acc[i][j], left[i], b0, b1);
          } else {
            mma_f16(acc[i][j], left[i], b0, b1);
          }
        }
      }
    }
  }
}

// The products of a tile. All threads of the block.
template <class T>
__device__ __forceinline__ void tile_products(float (&acc)[4][4][4], Shared& shared, const Sources& from,
                                              const void* anywhere, int64_t row_bytes) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
  }
  const int64_t pieces = (row_bytes + WIDTH - 1) / WIDTH;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < pieces) copy_stage(shared.stage[s], from, anywhere, static_cast<int64_t>(s) * WIDTH, row_bytes);
    copy_commit();
  }
  int reading = 0, writing = STAGES - 1;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // the stage is whole, and the one that is written next was read by all
    const int64_t ahead = piece + STAGES - 1;
    if (ahead < pieces) copy_stage(shared.stage[writing], from, anywhere, ahead * WIDTH, row_bytes);
    copy_commit();
    multiply_stage<T>(acc, shared.stage[reading]);
    reading = reading + 1 == STAGES ? 0 : reading + 1;
    writing = writing + 1 == STAGES ? 0 : writing + 1;
  }
  copy_wait<0>();
  __syncthreads();  // the next tile writes the stages
}

// The rows and latents that a thread copies, of a tile that begins at (row0, column0).
template <class RowOf, class LatentOf>
__device__ __forceinline__ Sources sources_of(const EncodeInput& in, int item, RowOf row_of, LatentOf latent_of) {
  const int place = thread_index() / 4;
  Sources from;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row_of(place + 64 * i), latent = latent_of(place + 64 * i);
    from.row[i] = row < 0 ? nullptr : static_cast<const unsigned char*>(in.x) + row * in.x_stride * item;
    from.row[2 + i] = latent < 0 ? nullptr : static_cast<const unsigned char*>(in.weight) + latent * in.w_stride * item;
  }
  return from;
}

// Calls f with a null pointer of the type that the products are made of.
template <class F>
void visit_elements(const EncodeInput& in, F f) {
  if (in.dtype == DType::f32 && in.tf32) {
    f(static_cast<Tf32*>(nullptr));
  } else {
    visit(in.dtype, f);
  }
}

template <class T, template <class> class Epilogue>
__global__ void __launch_bounds__(THREADS, std::is_same_v<T, float> ? 1 : 2)
    portable_kernel(const __grid_constant__ EncodeInput in, const __grid_constant__ typename Epilogue<Frame>::Args args,
                    int64_t columns, int32_t step, const int32_t* run) {
  if (run && *run == 0) return;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t tiles_m = (in.n + ROWS - 1) / ROWS, tiles_n = (columns + COLUMNS - 1) / COLUMNS;
  Epilogue<Frame> epilogue(in, args, frame_of(shared));
  float acc[4][4][4];
  for (int64_t tile = blockIdx.x; tile < tiles_m * tiles_n; tile += gridDim.x) {
    const Place place = tile_place(tile, tiles_m, tiles_n);
    const int64_t row0 = place.row * ROWS, column0 = place.column * COLUMNS;
    epilogue.begin(row0, column0);
    const Sources from = sources_of(
        in, sizeof(T), [&](int r) { return row0 + r < in.n ? row0 + r : -1; },
        [&](int c) -> int64_t {
          if (column0 + c >= columns) return -1;
          return Epilogue<Frame>::SAMPLED ? sampled_latent(static_cast<int32_t>(column0 + c), step) : column0 + c;
        });
    tile_products<T>(acc, shared, from, in.x, in.d * static_cast<int64_t>(sizeof(T)));
    epilogue.finish(acc);
  }
}

}  // namespace portable
}  // namespace fusae::cuda
