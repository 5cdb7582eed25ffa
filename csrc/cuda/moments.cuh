// SPDX-License-Identifier: Apache-2.0
// Moments in few bits and the counter-based random bits that round them: the formulas of python/fusae/reference/moments.py.
// A warp has 256 columns, which share the exponent of 8-bit codes, a thread 8 of them in groups of V side by side.
#pragma once
#include "cuda/common.cuh"

namespace fusae::cuda {

constexpr int64_t MOMENT_BLOCK = 256;
constexpr int OWN = 8;  // columns of a thread

__device__ inline uint64_t mix64(uint64_t a) {
  a = (a ^ (a >> 30)) * 0xBF58476D1CE4E5B9u;
  a = (a ^ (a >> 27)) * 0x94D049BB133111EBu;
  return a ^ (a >> 31);
}

// 16 + 16 random bits of a column.
__device__ inline uint32_t random_bits(uint32_t key, int64_t column) {
  uint32_t a = key + static_cast<uint32_t>(column) * 0x9E3779B9u;
  a = (a ^ (a >> 16)) * 0x7FEB352Du;
  a = (a ^ (a >> 15)) * 0x846CA68Bu;
  return a ^ (a >> 16);
}

// Rounded up or down with the probability that keeps the mean. An infinity stays; a NaN is made quiet.
__device__ inline bf16 random_bf16(float a, uint32_t lot) {
  const uint32_t raw = __float_as_uint(a), rest = raw & 0x7fffffffu;
  const uint32_t special = rest > 0x7f800000u ? raw | 0x400000u : raw;
  return {static_cast<uint16_t>((rest < 0x7f800000u ? raw + (lot & 0xffffu) : special) >> 16)};
}

// 8-bit codes: 3 bits of mantissa over OCTAVES exponents below that of the block, evenly spaced below those.
template <bool SIGNED>
struct Code {
  static constexpr uint32_t OCTAVES = SIGNED ? 15 : 31, HIGHEST = SIGNED ? 127 : 255;
  static constexpr uint32_t OFFSET = (127 - OCTAVES) << 23;
  static constexpr float STEP = SIGNED ? 0x1p-17f : 0x1p-33f;
};

__device__ inline int64_t code_row_bytes(int64_t d) { return d + cdiv(d, MOMENT_BLOCK); }

template <bool SIGNED>
__device__ inline float decoded(uint32_t code, float scale) {
  using C = Code<SIGNED>;
  const uint32_t magnitude = SIGNED ? code & 0x7f : code;
  const float fine = static_cast<float>(static_cast<int32_t>(magnitude)) * C::STEP;
  const float value = (magnitude < 8 ? fine : __uint_as_float((magnitude << 20) + C::OFFSET)) * scale;
  return SIGNED && code > 127 ? -value : value;
}

template <bool SIGNED>
__device__ inline uint8_t encoded(float a, uint32_t exponent, uint32_t bits) {
  using C = Code<SIGNED>;
  if (exponent == 0 || exponent == 255) return 0;
  const uint32_t raw = __float_as_uint(a), lot = SIGNED ? bits & 0xffffu : bits >> 16;
  const float unit = __uint_as_float(raw & 0x7fffffffu) * __uint_as_float((254 - exponent) << 23);
  const float fine = unit * (1.0f / C::STEP) + (static_cast<float>(static_cast<int32_t>(lot)) + 0.5f) * 0x1p-16f;
  const uint32_t even = static_cast<uint32_t>(static_cast<int32_t>(fine < 16.0f ? fine : 16.0f));
  const uint32_t coarse = ((__float_as_uint(unit) + (lot << 4) + 8) >> 20) - (C::OFFSET >> 20);
  uint32_t code = unit < C::STEP * 8.0f ? even : coarse;
  code = code > C::HIGHEST ? C::HIGHEST : code;
  if (SIGNED) {
    code |= code ? (raw >> 24) & 0x80 : 0;
  } else {  // a denominator of 0 would be the largest step of all
    code = code == 0 && unit > 0.0f ? 1 : code;
  }
  return static_cast<uint8_t>(code);
}

// Column number i of this thread in a block of 256.
template <int V>
__device__ inline int64_t column_of(int64_t block, int i) {
  return block * MOMENT_BLOCK + (i / V) * 32 * V + static_cast<int64_t>(threadIdx.x % 32) * V + i % V;
}

// This thread's columns of a row, 0 past its end.
template <int V, class T>
__device__ inline void read_columns(float (&out)[OWN], const T* row, int64_t block, int64_t d) {
#pragma unroll
  for (int i = 0; i < OWN; i += V) {
    const int64_t c = column_of<V>(block, i);
    Pack<T, V> pack;
    pack.raw = {};
    if (c < d) pack = load<T, V>(row + c);
#pragma unroll
    for (int v = 0; v < V; ++v) out[i + v] = to_float(pack.item[v]);
  }
}
template <int V, class T>
__device__ inline void write_columns(T* row, const float (&a)[OWN], int64_t block, int64_t d) {
#pragma unroll
  for (int i = 0; i < OWN; i += V) {
    const int64_t c = column_of<V>(block, i);
    float group[V];
#pragma unroll
    for (int v = 0; v < V; ++v) group[v] = a[i + v];
    if (c < d) store<T, V>(row + c, group);
  }
}

template <bool SIGNED, int V>
__device__ inline void read_moments(float (&out)[OWN], const void* stored, Moments type, int64_t row, int64_t block,
                                    int64_t d) {
  if (type == Moments::f32) {
    read_columns<V>(out, static_cast<const float*>(stored) + row * d, block, d);
  } else if (type == Moments::bf16) {
    read_columns<V>(out, static_cast<const bf16*>(stored) + row * d, block, d);
  } else {
    const uint8_t* codes = static_cast<const uint8_t*>(stored) + row * code_row_bytes(d);
    const float scale = __uint_as_float(static_cast<uint32_t>(codes[d + block]) << 23);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t c = column_of<V>(block, i);
      out[i] = c < d ? decoded<SIGNED>(codes[c], scale) : 0.0f;
    }
  }
}

// All lanes of a warp come here.
template <bool SIGNED, int V>
__device__ inline void write_moments(void* stored, Moments type, int64_t row, int64_t block, int64_t d,
                                     const float (&a)[OWN], uint32_t key) {
  if (type == Moments::f32) {
    write_columns<V>(static_cast<float*>(stored) + row * d, a, block, d);
    return;
  }
  if (type == Moments::bf16) {
    bf16* to = static_cast<bf16*>(stored) + row * d;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t c = column_of<V>(block, i);
      if (c < d) to[c] = random_bf16(a[i], random_bits(key, c) >> (SIGNED ? 0 : 16));
    }
    return;
  }
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const uint32_t rest = column_of<V>(block, i) < d ? __float_as_uint(a[i]) & 0x7fffffffu : 0;
    top = rest > top ? rest : top;
  }
  top = warp_max(top);
  // One more where the largest would be rounded beyond the highest code; 255 marks a block that is not finite.
  uint32_t exponent = (top + 0xfffffu) >> 23;
  exponent = exponent > 253 ? 253 : exponent;
  if (top >= 0x7f800000u) exponent = 255;
  uint8_t* codes = static_cast<uint8_t*>(stored) + row * code_row_bytes(d);
  if (threadIdx.x % 32 == 0) codes[d + block] = static_cast<uint8_t>(exponent);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int64_t c = column_of<V>(block, i);
    if (c < d) codes[c] = encoded<SIGNED>(a[i], exponent, random_bits(key, c));
  }
}

}  // namespace fusae::cuda
