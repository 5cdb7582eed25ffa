// SPDX-License-Identifier: Apache-2.0
// Checks that need the data and not only the shapes. A bad index would read or write outside the weights.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fusae/ops.h"

namespace fusae {

inline void check_codes(const Codes& c, int64_t storage, int64_t m) {
  if (c.n > INT32_MAX) throw std::out_of_range("at most 2**31 - 1 rows, got " + std::to_string(c.n));
  int64_t used = c.n * c.width;
  if (c.offsets) {
    if (c.offsets[0] != 0) throw std::out_of_range("offsets[0] must be 0, got " + std::to_string(c.offsets[0]));
    for (int64_t i = 0; i < c.n; ++i) {
      if (c.offsets[i + 1] < c.offsets[i])
        throw std::out_of_range("offsets must not decrease, got " + std::to_string(c.offsets[i]) + " then " +
                                std::to_string(c.offsets[i + 1]) + " at row " + std::to_string(i));
    }
    used = c.offsets[c.n];
    if (used > storage)
      throw std::out_of_range("offsets[-1] must be at most the storage of " + std::to_string(storage) +
                              " entries, got " + std::to_string(used));
  }
  for (int64_t e = 0; e < used; ++e) {
    if (c.indices[e] < 0 || c.indices[e] >= m)
      throw std::out_of_range("indices must lie in [0, " + std::to_string(m) + "), got " +
                              std::to_string(c.indices[e]) + " at entry " + std::to_string(e));
  }
}

// The sort by latent writes a row and its group as one int32.
inline void check_rows_of_groups(int64_t n, int64_t groups) {
  if (groups > 1 && n > INT32_MAX / groups)
    throw std::out_of_range("rows times prefixes must be at most 2**31 - 1, got " + std::to_string(n) + " times " +
                            std::to_string(groups) + "; split the batch");
}

// Rows of a row-sparse gradient: twice the same would be updated by two threads.
inline void check_rows(const int64_t* rows, int64_t u, int64_t m) {
  for (int64_t i = 0; i < u; ++i) {
    if (rows[i] < 0 || rows[i] >= m)
      throw std::out_of_range("grad: rows must lie in [0, " + std::to_string(m) + "), got " + std::to_string(rows[i]));
    if (i > 0 && rows[i] <= rows[i - 1])
      throw std::out_of_range("grad: rows must ascend, each once, got " + std::to_string(rows[i - 1]) + " then " +
                              std::to_string(rows[i]) + "; coalesce it, and do not mark it coalesced by hand");
  }
}

}  // namespace fusae
