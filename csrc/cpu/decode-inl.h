// SPDX-License-Identifier: Apache-2.0
// y[i] = Σ values[e] * weight[indices[e]] + bias. Entries of value 0 are left out, whatever their row holds.

// acc += Σ c[e] * rows[e], four rows at a time in order.
template <class T>
inline void add_rows(float* acc, const float* c, const T* const* rows, int64_t count, int64_t d) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) {
    const V c0 = set1(c[e]), c1 = set1(c[e + 1]), c2 = set1(c[e + 2]), c3 = set1(c[e + 3]);
    const T *r0 = rows[e], *r1 = rows[e + 1], *r2 = rows[e + 2], *r3 = rows[e + 3];
    int64_t j = 0;
    for (; j + N <= d; j += N) {
      V s = fma(c0, load(r0 + j), load(acc + j));
      s = fma(c1, load(r1 + j), s);
      s = fma(c2, load(r2 + j), s);
      store(acc + j, fma(c3, load(r3 + j), s));
    }
    for (; j < d; ++j) {
      acc[j] = __builtin_fmaf(c[e], get(r0 + j), acc[j]);
      acc[j] = __builtin_fmaf(c[e + 1], get(r1 + j), acc[j]);
      acc[j] = __builtin_fmaf(c[e + 2], get(r2 + j), acc[j]);
      acc[j] = __builtin_fmaf(c[e + 3], get(r3 + j), acc[j]);
    }
  }
  for (; e < count; ++e) {
    const V c0 = set1(c[e]);
    const T* r0 = rows[e];
    int64_t j = 0;
    for (; j + N <= d; j += N) store(acc + j, fma(c0, load(r0 + j), load(acc + j)));
    for (; j < d; ++j) acc[j] = __builtin_fmaf(c[e], get(r0 + j), acc[j]);
  }
}

// Converts and writes a row of float sums.
template <class T>
inline void write_row(T* out, const float* acc, int64_t d) {
  int64_t j = 0;
  for (; j + N <= d; j += N) store(out + j, load(acc + j));
  for (; j < d; ++j) put(out + j, acc[j]);
}

void decode(const DecodeArgs& a) {
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    parallel_for(a.codes.n, 16, a.threads, [&](int64_t begin, int64_t end) {
      int64_t widest = a.codes.width;
      if (a.codes.offsets) {
        widest = 0;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t width = a.codes.offsets[i + 1] - a.codes.offsets[i];
          widest = width > widest ? width : widest;
        }
      }
      Scratch<float> acc(a.d), coef(widest);
      Scratch<const T*> rows(widest);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = a.codes.offsets ? a.codes.offsets[i] : i * a.codes.width;
        const int64_t last = a.codes.offsets ? a.codes.offsets[i + 1] : first + a.codes.width;
        int64_t count = 0;
        for (int64_t e = first; e < last; ++e) {
          const float v = get(a.codes.values, a.codes.dtype, e);
          if (v == 0.0f) continue;
          coef.data[count] = v;
          rows.data[count++] = weight + static_cast<int64_t>(a.codes.indices[e]) * a.d;
        }
        // The bias is added last, after the sum, as in the reference.
        std::memset(acc.data, 0, static_cast<size_t>(a.d) * sizeof(float));
        add_rows(acc.data, coef.data, rows.data, count, a.d);
        if (bias) {
          for (int64_t j = 0; j < a.d; ++j) acc.data[j] += get(bias + j);
        }
        write_row(static_cast<T*>(a.out) + i * a.d, acc.data, a.d);
      }
    });
  });
}
