// SPDX-License-Identifier: Apache-2.0
// Element types that cross the Python boundary.
#pragma once
#include <cstdint>

namespace fusae {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace fusae
