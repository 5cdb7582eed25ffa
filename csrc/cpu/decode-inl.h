// SPDX-License-Identifier: Apache-2.0
// y[i] = Σ values[e] * weight[indices[e]] + bias. Entries of value 0 are left out, whatever their row holds.

constexpr int64_t AHEAD = 4;  // rows asked for while the present ones are summed

// Rows are scattered over memory, so the processor cannot foresee the next ones.
template <class T>
inline void prefetch_rows(const T* const* rows, int64_t j) {
  for (int64_t e = 0; e < AHEAD; ++e) __builtin_prefetch(rows[e] + j);
}

// acc += Σ c[e] * rows[e] for E rows, in order.
template <int E, class T>
inline void add_few(float* acc, const float* c, const T* const* rows, int64_t d) {
  V coef[E];
  for (int e = 0; e < E; ++e) coef[e] = set1(c[e]);
  int64_t j = 0;
  for (; j + N <= d; j += N) {
    prefetch_rows(rows + E, j);
    V s = load(acc + j);
    for (int e = 0; e < E; ++e) s = fma(coef[e], load(rows[e] + j), s);
    store(acc + j, s);
  }
  for (; j < d; ++j) {
    for (int e = 0; e < E; ++e) acc[j] = __builtin_fmaf(c[e], get(rows[e] + j), acc[j]);
  }
}

// The same for any number of rows. `rows` has AHEAD more addresses behind: those likely needed next.
template <class T>
inline void add_rows(float* acc, const float* c, const T* const* rows, int64_t count, int64_t d) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) add_few<4>(acc, c + e, rows + e, d);
  switch (count - e) {
    case 3: add_few<3>(acc, c + e, rows + e, d); break;
    case 2: add_few<2>(acc, c + e, rows + e, d); break;
    case 1: add_few<1>(acc, c + e, rows + e, d); break;
  }
}

// Converts and writes a row of float sums.
template <class T>
inline void write_row(T* out, const float* acc, int64_t d) {
  int64_t j = 0;
  for (; j + N <= d; j += N) store(out + j, load(acc + j));
  for (; j < d; ++j) put(out + j, acc[j]);
}

// Entries of the longest of some rows of codes.
inline int64_t widest_row(const Codes& codes, int64_t begin, int64_t end) {
  if (!codes.offsets) return codes.width;
  int64_t widest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t width = codes.offsets[i + 1] - codes.offsets[i];
    widest = width > widest ? width : widest;
  }
  return widest;
}

void decode(const DecodeArgs& a) {
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    parallel_for(a.codes.n, 16, a.threads, [&](int64_t begin, int64_t end) {
      const int64_t widest = widest_row(a.codes, begin, end);
      Scratch<float> acc(a.d), coef(widest);
      Scratch<const T*> rows(widest + AHEAD);
      const int64_t used = a.codes.offsets ? a.codes.offsets[a.codes.n] : a.codes.n * a.codes.width;
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
        for (int64_t e = 0; e < AHEAD; ++e) {  // the next row of codes comes next
          rows.data[count + e] = weight + (last + e < used ? static_cast<int64_t>(a.codes.indices[last + e]) * a.d : 0);
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
