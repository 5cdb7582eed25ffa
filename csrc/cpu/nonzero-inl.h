// SPDX-License-Identifier: Apache-2.0
// The non-zeros of a dense matrix: one read of it leaves a bit for every entry and a count for every row; once the places
// of the rows are known, the entries themselves are fetched by their bits. NaN is not zero, -0.0 is.

constexpr int64_t ROW_TILE = 32;

template <class T>
inline uint64_t nonzero_bits(const T* p, int64_t width) {
  uint64_t bits = 0;
  int64_t j = 0;
  for (; j + N <= width; j += N) bits |= static_cast<uint64_t>(not_le(magnitude_of(load(p + j)), zero())) << j;
  for (; j < width; ++j) bits |= static_cast<uint64_t>(get(p + j) != 0.0f) << j;
  return bits;
}

// The bits of up to 64 columns of up to ROW_TILE rows; columns outside, so that a transposed matrix is read line by line.
template <class T>
inline void nonzero_tile(const T* p, int64_t stride, int64_t step, int64_t rows, int64_t width, uint64_t* bits) {
  for (int64_t i = 0; i < rows; ++i) bits[i] = 0;
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = 0; i < rows; ++i) bits[i] |= static_cast<uint64_t>(get(p + i * stride + j * step) != 0.0f) << j;
  }
}

void nonzero_mask(const NonzeroMaskArgs& a) {
  const int64_t words = (a.m + 63) / 64;
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* f = static_cast<const T*>(a.dense);
    parallel_for(a.n, ROW_TILE, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t top = begin; top < end; top += ROW_TILE) {
        const int64_t rows = end - top < ROW_TILE ? end - top : ROW_TILE;
        uint64_t bits[ROW_TILE];
        for (int64_t i = 0; i < rows; ++i) a.count[top + i] = 0;
        if (a.step == 1) {
          for (int64_t i = top; i < top + rows; ++i) {
            for (int64_t w = 0; w < words; ++w) {
              const int64_t width = a.m - 64 * w < 64 ? a.m - 64 * w : 64;
              const uint64_t found = nonzero_bits(f + i * a.stride + 64 * w, width);
              a.mask[i * words + w] = found;
              a.count[i] += __builtin_popcountll(found);
            }
          }
          continue;
        }
        for (int64_t w = 0; w < words; ++w) {
          const int64_t width = a.m - 64 * w < 64 ? a.m - 64 * w : 64;
          nonzero_tile(f + top * a.stride + 64 * w * a.step, a.stride, a.step, rows, width, bits);
          for (int64_t i = 0; i < rows; ++i) {
            a.mask[(top + i) * words + w] = bits[i];
            a.count[top + i] += __builtin_popcountll(bits[i]);
          }
        }
      }
    });
  });
}

void nonzero_take(const NonzeroTakeArgs& a) {
  const int64_t words = (a.m + 63) / 64;
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* f = static_cast<const T*>(a.dense);
    T* values = static_cast<T*>(a.values);
    parallel_for(a.n, ROW_TILE, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t at = a.offsets[i];
        for (int64_t w = 0; w < words; ++w) {
          for (uint64_t bits = a.mask[i * words + w]; bits && at < a.capacity; bits &= bits - 1) {
            const int64_t j = 64 * w + __builtin_ctzll(bits);
            values[at] = f[i * a.stride + j * a.step];
            a.indices[at++] = static_cast<int32_t>(j);
          }
        }
      }
    });
  });
}
