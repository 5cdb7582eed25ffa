// SPDX-License-Identifier: Apache-2.0
// The latent-major half of every backward: entries are sorted by latent once, then each latent is owned by one thread,
// which walks its entries in row order. One read of a row can serve both the sum over rows and the dot with the weight.

void by_latent(const ByLatentArgs& a) {
  const Codes& c = a.codes;
  const int64_t used = c.offsets ? c.offsets[c.n] : c.n * c.width;
  std::memset(a.start, 0, static_cast<size_t>(a.m + 1) * sizeof(int64_t));
  for (int64_t e = 0; e < used; ++e) ++a.start[c.indices[e] + 1];
  for (int64_t j = 0; j < a.m; ++j) a.start[j + 1] += a.start[j];
  // Placing an entry advances its latent's start to the next latent's; shifting by one afterwards restores it.
  for (int64_t i = 0; i < c.n; ++i) {
    const int64_t first = c.offsets ? c.offsets[i] : i * c.width;
    const int64_t last = c.offsets ? c.offsets[i + 1] : first + c.width;
    for (int64_t e = first; e < last; ++e) {
      const int64_t place = a.start[c.indices[e]]++;
      a.order[place] = e;
      a.row[place] = static_cast<int32_t>(i + c.n * group_of(a.nesting, c.indices[e], e - first));
    }
  }
  std::memmove(a.start + 1, a.start, static_cast<size_t>(a.m) * sizeof(int64_t));
  a.start[0] = 0;
}

// acc += Σ c[e] * rows[e] and dots[e] = rows[e] · w, for E rows.
template <int E, bool SUM, class T>
inline void fused_few(float* acc, const float* c, const T* const* rows, const T* w, float* dots, int64_t d) {
  V coef[E], dot[E];
  for (int e = 0; e < E; ++e) {
    coef[e] = set1(SUM ? c[e] : 0.0f);
    dot[e] = zero();
  }
  int64_t j = 0;
  for (; j + N <= d; j += N) {
    prefetch_rows(rows + E, j);
    const V weight = load(w + j);
    V s = SUM ? load(acc + j) : zero();
    for (int e = 0; e < E; ++e) {
      const V r = load(rows[e] + j);
      if (SUM) s = fma(coef[e], r, s);
      dot[e] = fma(r, weight, dot[e]);
    }
    if (SUM) store(acc + j, s);
  }
  for (int e = 0; e < E; ++e) {
    float tail = 0.0f;
    for (int64_t t = j; t < d; ++t) {
      const float r = get(rows[e] + t);
      if (SUM) acc[t] = __builtin_fmaf(c[e], r, acc[t]);
      tail = __builtin_fmaf(r, get(w + t), tail);
    }
    dots[e] = sum(dot[e]) + tail;
  }
}

template <bool SUM, class T>
inline void fused_rows(float* acc, const float* c, const T* const* rows, const T* w, float* dots, int64_t count,
                       int64_t d) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) fused_few<4, SUM>(acc, c + e, rows + e, w, dots + e, d);
  switch (count - e) {
    case 3: fused_few<3, SUM>(acc, c + e, rows + e, w, dots + e, d); break;
    case 2: fused_few<2, SUM>(acc, c + e, rows + e, w, dots + e, d); break;
    case 1: fused_few<1, SUM>(acc, c + e, rows + e, w, dots + e, d); break;
  }
}

template <class T>
struct LatentScratch {
  explicit LatentScratch(int64_t d) : acc(d) {}
  Scratch<float> acc;
  static constexpr int64_t BATCH = 64;
  float coef[BATCH], dots[BATCH];
  const T* rows[BATCH + AHEAD];
};

template <class T>
inline void visit_latent(const LatentPassArgs& a, int64_t latent, int64_t out_row, LatentScratch<T>& s) {
  const T* rows = static_cast<const T*>(a.rows);
  const T* w = a.dots ? static_cast<const T*>(a.weight) + latent * a.d : nullptr;
  const int64_t first = a.start[latent], last = a.start[latent + 1], entries = a.start[a.m];
  if (a.sum) std::memset(s.acc.data, 0, static_cast<size_t>(a.d) * sizeof(float));
  float coef_sum = 0.0f;
  for (int64_t begin = first; begin < last; begin += s.BATCH) {
    const int64_t count = last - begin < s.BATCH ? last - begin : s.BATCH;
    int64_t live = 0;  // entries whose row goes into the sum: the coefficient is not 0
    for (int64_t e = 0; e < count; ++e) {
      s.coef[e] = get(a.codes.values, a.codes.dtype, a.order[begin + e]);
      coef_sum += s.coef[e];
      live += s.coef[e] != 0.0f;
    }
    for (int64_t e = 0; e < count + AHEAD; ++e) {  // the next latent's entries lie behind this one's
      s.rows[e] = rows + (begin + e < entries ? static_cast<int64_t>(a.row[begin + e]) * a.d : 0);
    }
    if (a.dots) {
      if (a.sum && live == count) {
        fused_rows<true>(s.acc.data, s.coef, s.rows, w, s.dots, count, a.d);
      } else {
        fused_rows<false>(s.acc.data, s.coef, s.rows, w, s.dots, count, a.d);
      }
      for (int64_t e = 0; e < count; ++e) put(a.dots, a.codes.dtype, a.order[begin + e], a.scale * s.dots[e]);
    }
    if (a.sum && !(a.dots && live == count)) {
      int64_t kept = 0;
      for (int64_t e = 0; e < count; ++e) {
        if (s.coef[e] == 0.0f) continue;
        s.coef[kept] = s.coef[e];
        s.rows[kept++] = s.rows[e];
      }
      add_rows(s.acc.data, s.coef, s.rows, kept, a.d);
    }
  }
  if (a.sum) {
    if (a.scale != 1.0f) mix_rows(s.acc.data, a.scale, nullptr, a.d);
    write_row(static_cast<T*>(a.sum) + out_row * a.d, s.acc.data, a.d);
  }
  if (a.coef_sum) put(static_cast<T*>(a.coef_sum) + latent, coef_sum);
}

void latent_pass(const LatentPassArgs& a) {
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(a.latents ? a.u : a.m, 64, a.threads, [&](int64_t begin, int64_t end) {
      LatentScratch<T> scratch(a.d);
      for (int64_t i = begin; i < end; ++i) visit_latent<T>(a, a.latents ? a.latents[i] : i, i, scratch);
    });
  });
}
