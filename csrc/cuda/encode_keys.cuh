// SPDX-License-Identifier: Apache-2.0
// Scores and their order, the sampled latents and the order of tiles: plain arithmetic, for the host and the device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fusae/cuda_encode.h"

namespace fusae::cuda {

#ifdef __CUDACC__
#define FUSAE_PURE __host__ __device__ __forceinline__
#else
#define FUSAE_PURE inline
#endif

FUSAE_PURE uint32_t float_bits(float a) {
  uint32_t u;
  memcpy(&u, &a, 4);
  return u;
}
FUSAE_PURE float bits_float(uint32_t u) {
  float a;
  memcpy(&a, &u, 4);
  return a;
}

// float -> unsigned integer in the same order: -0.0 equals +0.0, NaN of either sign is the largest. Never 0.
FUSAE_PURE uint32_t order_bits(float a) {
  if (a != a) return 0xffffffffu;
  const uint32_t u = a == 0.0f ? 0u : float_bits(a);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
FUSAE_PURE float from_order_bits(uint32_t key) {
  if (key == 0xffffffffu) return bits_float(0x7fc00000u);
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The unique key of an entry: larger score first, equal scores by the lower latent. Never 0.
FUSAE_PURE uint64_t key_of(float score, int32_t latent) {
  return static_cast<uint64_t>(order_bits(score)) << 32 | (0xffffffffu - static_cast<uint32_t>(latent));
}
FUSAE_PURE int32_t key_latent(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

FUSAE_PURE Entry entry_of(float pre, int32_t latent) {
  return static_cast<Entry>(static_cast<uint32_t>(latent)) << 32 | float_bits(pre);
}
FUSAE_PURE int32_t entry_latent(Entry e) { return static_cast<int32_t>(e >> 32); }
FUSAE_PURE float entry_pre(Entry e) { return bits_float(static_cast<uint32_t>(e)); }

// What orders entries. A score is made of a pre-activation by one multiplication at most: the same bits wherever.
struct Scoring {
  const float* norms;
  bool magnitude;
};
FUSAE_PURE float score_of(float pre, float norm, bool magnitude) { return (magnitude ? fabsf(pre) : pre) * norm; }
FUSAE_PURE uint64_t entry_key(Entry e, const Scoring& s) {
  const int32_t latent = entry_latent(e);
  return key_of(score_of(entry_pre(e), s.norms ? s.norms[latent] : 1.0f, s.magnitude), latent);
}

// What a score has to reach in a tile whose first column is `first`, where entries at or above (bound, last) are
// wanted: in tiles behind `last` the next float, as equal scores go by the lower latent. In the tile of `last` all that
// equal the bound pass: they come next in the order, so what passes is still all above an entry.
FUSAE_PURE float least_score(float bound, int32_t last, int64_t first) {
  const uint32_t key = order_bits(bound);
  return first <= last || key >= 0xff800000u ? bound : from_order_bits(key + 1);  // +Inf stays
}

// The j-th sampled latent. Runs of 16 neighbours (what TMA fetches at once), one in every m / (size / 16) latents, at a
// hashed place, so that no period of the latents is in tune.
constexpr int RUN = 16;
FUSAE_PURE int32_t sampled_run(uint32_t run, int32_t step) {
  uint32_t h = run * 2654435761u;
  h ^= h >> 15;
  const uint32_t room = static_cast<uint32_t>(step - RUN + 1);
  return static_cast<int32_t>(run) * step + static_cast<int32_t>((static_cast<uint64_t>(h) * room) >> 32);
}
FUSAE_PURE int32_t sampled_latent(int32_t j, int32_t step) {
  return sampled_run(static_cast<uint32_t>(j) / RUN, step) + j % RUN;
}
FUSAE_PURE int32_t sample_step(int64_t m, int64_t size) { return static_cast<int32_t>(m / (size / RUN)); }

// GROUP row tiles go along the columns together, so that both operands stay in L2.
constexpr int GROUP = 8;
struct Place {
  int64_t row, column;  // of tiles
};
FUSAE_PURE Place tile_place(int64_t tile, int64_t tiles_m, int64_t tiles_n) {
  const int64_t per_group = GROUP * tiles_n, first = tile / per_group * GROUP, within = tile % per_group;
  const int64_t size = tiles_m - first < GROUP ? tiles_m - first : GROUP;
  return {first + within % size, within / size};
}

// Ranges of columns that each block of listed rows is cut into, where there are buffers for `units` of them.
FUSAE_PURE int64_t repair_splits(int64_t units, int64_t blocks, int64_t most) {
  const int64_t each = units / (blocks < 1 ? 1 : blocks);
  return each < 1 ? 1 : each < most ? each : most;
}

}  // namespace fusae::cuda
