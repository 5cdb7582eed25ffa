// SPDX-License-Identifier: Apache-2.0
// The GEMM of the encoders on compute capability 9.0, 16-bit elements: persistent, specialised by warpgroup.
//
// A block has a tile of 128 rows and 256 latents. Warpgroup 0 copies: one thread keeps STAGES pieces of 64 columns of d
// on their way by TMA. Warpgroups 1 and 2 multiply 64 rows each by wgmma and do with the products what the epilogue
// says. Two blocks of a cluster have the same latents and neighbouring rows: each fetches half of the latents for both,
// which cuts the traffic from L2 by a third.
//
// Warpgroup 2 begins every tile `lag` pieces behind warpgroup 1. So they do not come to the epilogue together: one
// scans while the tensor cores have the other's products. (Ping-pong proper, a tile of its own for each, would want
// tiles of 64 rows, and more from L2 than it gives.)
//
// Shared memory of a piece: rows of 128 bytes, 8 of which are an atom of 1024 in which TMA's 128-byte swizzle moves
// 16-byte chunk c of row r to place c ^ r % 8; the descriptors say the same to wgmma.
#pragma once
#include "cuda/encode_epilogue.cuh"

namespace fusae::cuda {

namespace hopper {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4, BOX = 128;
constexpr int ROW_BYTES = DEPTH * 2, A_BYTES = ROWS * ROW_BYTES, B_BYTES = COLUMNS * ROW_BYTES;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int LAG_BARRIER = CONSUMERS + 1;  // the teams have 1 and 2

using Frame = Team<1, 32, COLUMNS, 128>;

struct Shared {
  unsigned char stage[STAGES][STAGE_BYTES];  // at a multiple of 1024
  TeamShared<COLUMNS> team[CONSUMERS];
  uint64_t full[STAGES], empty[STAGES];
};
constexpr int SHARED_BYTES = static_cast<int>(sizeof(Shared));
static_assert(SHARED_BYTES <= 227 * 1024, "what a block can have");
static_assert(STAGE_BYTES % 1024 == 0 && A_BYTES % 1024 == 0, "swizzle atoms");
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536, "registers of a multiprocessor");

// The matrix of 16-bit elements, rows of 128 swizzled bytes, at a shared address: PTX ISA, "matrix descriptor".
FUSAE_PURE uint64_t matrix_descriptor(uint32_t address) {
  const uint64_t start = (address & 0x3ffff) >> 4;
  const uint64_t leading = 1;          // not used by swizzled layouts whose rows are along k
  const uint64_t stride = 1024 >> 4;   // from 8 rows to the next 8
  const uint64_t swizzle_128 = 1;
  return start | leading << 16 | stride << 32 | swizzle_128 << 62;
}
constexpr uint64_t NEXT_K = 32 >> 4;  // 16 elements further along k, within the swizzled 128 bytes

// How far warpgroup 2 stays behind. The barrier between the two counts to one turn: warpgroup 1 can't be a tile ahead,
// as its pieces only become free with warpgroup 2.
FUSAE_PURE int lag_of(int pieces) { return pieces >= 2 * STAGES ? 2 : 0; }

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#if defined(FUSAE_HOPPER) || defined(FUSAE_EMULATED)

template <class T>
__device__ __forceinline__ void multiply(float (&acc)[1][32][4], uint64_t a, uint64_t b, int more) {
  if constexpr (std::is_same_v<T, bf16>) {
    products_bf16(acc, a, b, more);
  } else {
    products_f16(acc, a, b, more);
  }
}

// One thread: everything that the block, and half of what the cluster, multiplies.
template <bool SAMPLED>
__device__ __forceinline__ void produce(Shared& shared, const TensorMap& x_map, const TensorMap& w_map,
                                        const EncodeInput& in, int64_t columns, int64_t tiles_m, int64_t tiles_n,
                                        int32_t step, uint32_t rank, uint32_t size) {
  const int pieces = static_cast<int>((in.d + DEPTH - 1) / DEPTH);
  const int64_t clusters = cluster_count();
  const uint16_t everyone = static_cast<uint16_t>((1u << size) - 1);
  constexpr int BOX_ROWS = SAMPLED ? RUN : BOX, BOXES = COLUMNS / BOX_ROWS;
  Ring ring;
  for (int64_t tile = cluster_index(); tile < tiles_m * tiles_n; tile += clusters) {
    const Place place = tile_place(tile, tiles_m, tiles_n);
    const int row = static_cast<int>((place.row * size + rank) * ROWS), column = static_cast<int>(place.column * COLUMNS);
    for (int piece = 0; piece < pieces; ++piece) {
      unsigned char* const a = shared.stage[ring.stage];
      uint64_t* const full = &shared.full[ring.stage];
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      barrier_expect(full, STAGE_BYTES);  // with what the other block sends
      tensor_load(a, &x_map, piece * DEPTH, row, full);
      for (int box = static_cast<int>(rank); box < BOXES; box += static_cast<int>(size)) {
        int latent = column + box * BOX_ROWS;
        // Past the sample: outside the matrix, zeros.
        if (SAMPLED) latent = latent < columns ? sampled_run(static_cast<uint32_t>(latent) / RUN, step) : static_cast<int>(in.m);
        unsigned char* const to = a + A_BYTES + box * BOX_ROWS * ROW_BYTES;
        if (size == 1) {
          tensor_load(to, &w_map, piece * DEPTH, latent, full);
        } else {
          tensor_load_all(to, &w_map, piece * DEPTH, latent, full, everyone);
        }
      }
      ring.next();
    }
  }
}

// A warp's word that it has read a piece, to both blocks: each of them writes into it.
__device__ __forceinline__ void release(Shared& shared, int stage, uint32_t size) {
  const uint32_t lane = static_cast<uint32_t>(thread_index()) % 32;
  if (lane < size) barrier_arrive(&shared.empty[stage], lane);
}

template <class T, class Epilogue>
__device__ __forceinline__ void consume(Shared& shared, Epilogue& epilogue, const EncodeInput& in, int64_t tiles_m,
                                        int64_t tiles_n, int group, uint32_t rank, uint32_t size) {
  const int pieces = static_cast<int>((in.d + DEPTH - 1) / DEPTH), lag = lag_of(pieces);
  const int64_t clusters = cluster_count();
  Ring ring;
  float acc[1][32][4];
#pragma unroll
  for (int j = 0; j < 32; ++j) acc[0][j][0] = acc[0][j][1] = acc[0][j][2] = acc[0][j][3] = 0.0f;
  for (int64_t tile = cluster_index(); tile < tiles_m * tiles_n; tile += clusters) {
    const Place place = tile_place(tile, tiles_m, tiles_n);
    epilogue.begin((place.row * size + rank) * ROWS + group * 64, place.column * COLUMNS);
    if (lag && group == 1) named_barrier(LAG_BARRIER, 256);
    int before = 0;
    for (int piece = 0; piece < pieces; ++piece) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      const uint32_t at = shared_address(shared.stage[ring.stage]);
      const uint64_t a = matrix_descriptor(at + group * 64 * ROW_BYTES), b = matrix_descriptor(at + A_BYTES);
      products_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k) multiply<T>(acc, a + k * NEXT_K, b + k * NEXT_K, piece | k);
      products_commit();
      if (piece > 0) {
        products_wait<1>(acc);  // of the piece before
        release(shared, before, size);
      }
      if (lag && group == 0 && piece == lag - 1) named_barrier_arrive(LAG_BARRIER, 256);
      before = ring.stage;
      ring.next();
    }
    products_wait<0>(acc);
    release(shared, before, size);
    epilogue.finish(acc);
  }
}
#endif

// `run`: with it, nothing happens unless it points to something else than 0.
template <class T, template <class> class Epilogue>
__global__ void __launch_bounds__(THREADS, 1)
    hopper_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                  const __grid_constant__ EncodeInput in, const __grid_constant__ typename Epilogue<Frame>::Args args,
                  int64_t columns, int32_t step, const int32_t* run) {
#if defined(FUSAE_HOPPER) || defined(FUSAE_EMULATED)
  if (run && *run == 0) return;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = thread_index(), group = thread / 128 - 1;
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const int64_t rows = static_cast<int64_t>(ROWS) * size;
  const int64_t tiles_m = (in.n + rows - 1) / rows, tiles_n = (columns + COLUMNS - 1) / COLUMNS;
  if (thread == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], CONSUMERS * 4 * static_cast<int>(size));  // every warp of every block
    }
    barrier_init_fence();
    tensor_prefetch(&x_map);
    tensor_prefetch(&w_map);
  }
  cluster_sync();
  if (group < 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (thread == 0) produce<Epilogue<Frame>::SAMPLED>(shared, x_map, w_map, in, columns, tiles_m, tiles_n, step, rank, size);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int lane = thread % 32, warp = thread / 32 % 4;
    const Frame frame{&shared.team[group], thread % 128, warp * 16 + lane / 4, lane % 4 * 2, group + 1};
    Epilogue<Frame> epilogue(in, args, frame);
    consume<T>(shared, epilogue, in, tiles_m, tiles_n, group, rank, size);
  }
  cluster_sync();  // no block ends while the other may still write to it
#endif
}

}  // namespace hopper
}  // namespace fusae::cuda
