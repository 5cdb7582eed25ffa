// SPDX-License-Identifier: Apache-2.0
// Element types that cross the Python boundary, and their scalar conversions. The only dtype switch is `visit`.
#pragma once
#include <cstdint>

namespace fusae {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// Storage types: distinct names for the two 16-bit formats, so that overloads can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace {  // internal linkage: translation units for different processors must not share these

inline uint32_t bits_of(float a) {
  uint32_t u;
  __builtin_memcpy(&u, &a, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float a;
  __builtin_memcpy(&a, &u, 4);
  return a;
}
inline float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
inline uint16_t float_to_bf16(float a) {
  const uint32_t u = bits_of(a);
  if (a != a) return static_cast<uint16_t>((u | 0x400000) >> 16);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13) | (rest > 0x7c00 ? 0x400000 : 0));
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float a = static_cast<float>(rest) * 0x1p-24f;  // subnormal: exact
  return float_of(sign | bits_of(a));
}
inline uint16_t float_to_f16(float a) {
  const uint32_t u = bits_of(a), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((rest >> 13) & 0x3ff));
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
  if (rest < 0x38800000) {                                             // subnormal: let the addition round
    const float shifted = float_of(rest) + 0.5f;                       // ulp of 0.5 is 2^-24, the subnormal step
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000));
  }
  const uint32_t rounded = rest - (112u << 23) + 0xfff + ((rest >> 13) & 1);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

// Calls f with a null pointer of the storage type.
template <class F>
inline void visit(DType t, F f) {
  switch (t) {
    case DType::f32: f(static_cast<float*>(nullptr)); break;
    case DType::bf16: f(static_cast<bf16*>(nullptr)); break;
    case DType::f16: f(static_cast<f16*>(nullptr)); break;
  }
}

}  // namespace
}  // namespace fusae
