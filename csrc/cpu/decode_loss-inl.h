// SPDX-License-Identifier: Apache-2.0
// Residuals of nested reconstructions, their squares, and what the values' gradients need, in one gather of the rows.

// Bytes of gathered rows and residuals worked on together: they stay in a core's own cache for the second use.
constexpr int64_t ROW_CACHE = 256 << 10;

// Columns of a block, by the entries of the row alone: sums must not depend on the row's neighbours.
inline int64_t block_columns(int64_t count, int64_t groups, int64_t item, int64_t d) {
  const int64_t fit = ROW_CACHE / (count * item + groups * static_cast<int64_t>(sizeof(float))) / 64 * 64;
  return fit < 64 ? (d < 64 ? d : 64) : (fit < d ? fit : d);
}

inline int64_t group_of(const Nesting& nesting, int32_t latent, int64_t rank) {
  const int64_t key = nesting.by_rank ? rank : latent;
  int64_t low = 0, high = nesting.groups - 1;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (nesting.prefixes[mid] <= key) low = mid + 1; else high = mid;
  }
  return low;
}

// The entries of one row, ordered by group; within a group those of value 0 last, else as stored.
template <class T>
struct GroupedRow {
  GroupedRow(int64_t widest, int64_t groups)
      : bucket(widest), place(widest), bounds(2 * groups + 1), coef(widest), dots(widest), rows(widest + AHEAD) {}
  Scratch<int64_t> bucket, place, bounds;
  Scratch<float> coef, dots;  // coef = -value: what the row takes from the residual
  Scratch<const T*> rows;
  int64_t count;

  void fill(const DecodeLossArgs& a, int64_t first, int64_t last, int64_t used) {
    const T* weight = static_cast<const T*>(a.weight);
    const int64_t buckets = 2 * a.nesting.groups;
    count = last - first;
    std::memset(bounds.data, 0, static_cast<size_t>(buckets + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < count; ++e) {
      const bool padding = get(a.codes.values, a.codes.dtype, first + e) == 0.0f;
      bucket.data[e] = 2 * group_of(a.nesting, a.codes.indices[first + e], e) + padding;
      ++bounds.data[bucket.data[e] + 1];
    }
    for (int64_t b = 0; b < buckets; ++b) bounds.data[b + 1] += bounds.data[b];
    for (int64_t e = 0; e < count; ++e) {
      const int64_t at = bounds.data[bucket.data[e]]++;
      place.data[at] = first + e;
      coef.data[at] = -get(a.codes.values, a.codes.dtype, first + e);
      rows.data[at] = weight + static_cast<int64_t>(a.codes.indices[first + e]) * a.d;
      dots.data[at] = 0.0f;
    }
    std::memmove(bounds.data + 1, bounds.data, static_cast<size_t>(buckets) * sizeof(int64_t));
    bounds.data[0] = 0;
    for (int64_t e = 0; e < AHEAD; ++e) {  // the next row of codes comes next
      rows.data[count + e] = weight + (last + e < used ? static_cast<int64_t>(a.codes.indices[last + e]) * a.d : 0);
    }
  }
};

// out = target - bias
template <class T, class U>
inline void without_bias(float* out, const U* target, const T* bias, int64_t d) {
  int64_t j = 0;
  for (; j + N <= d; j += N) store(out + j, bias ? sub(load(target + j), load(bias + j)) : load(target + j));
  for (; j < d; ++j) out[j] = bias ? get(target + j) - get(bias + j) : get(target + j);
}

// acc = mix * acc + rest, rest may be null
inline void mix_rows(float* acc, float mix, const float* rest, int64_t d) {
  const V scale = set1(mix);
  int64_t j = 0;
  for (; j + N <= d; j += N) store(acc + j, rest ? fma(scale, load(acc + j), load(rest + j)) : mul(scale, load(acc + j)));
  for (; j < d; ++j) acc[j] = rest ? __builtin_fmaf(mix, acc[j], rest[j]) : mix * acc[j];
}

// dots[e] += rows[e] · w for E rows.
template <int E, class T>
inline void dot_few(const T* const* rows, const float* w, float* dots, int64_t d) {
  V dot[E];
  for (int e = 0; e < E; ++e) dot[e] = zero();
  int64_t j = 0;
  for (; j + N <= d; j += N) {
    const V weight = load(w + j);
    for (int e = 0; e < E; ++e) dot[e] = fma(load(rows[e] + j), weight, dot[e]);
  }
  for (int e = 0; e < E; ++e) {
    float tail = 0.0f;
    for (int64_t t = j; t < d; ++t) tail = __builtin_fmaf(get(rows[e] + t), w[t], tail);
    dots[e] += sum(dot[e]) + tail;
  }
}

template <class T>
inline void add_dots(const T* const* rows, const float* w, float* dots, int64_t count, int64_t d) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) dot_few<4>(rows + e, w, dots + e, d);
  for (; e < count; ++e) dot_few<1>(rows + e, w, dots + e, d);
}

// Columns [c, c + width) of row i. `acc` has room for `groups` rows of `width`; sse is one sum per group.
template <class T>
inline void loss_block(const DecodeLossArgs& a, int64_t i, int64_t c, int64_t width, GroupedRow<T>& row, float* acc,
                       float* sse) {
  const int64_t groups = a.nesting.groups, at = i * a.d + c;
  const int64_t* bounds = row.bounds.data;
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + c : nullptr;
  for (int64_t g = 0; g < groups; ++g) {
    float* residual = acc + g * width;
    if (g > 0) {
      std::memcpy(residual, residual - width, static_cast<size_t>(width) * sizeof(float));
    } else if (a.target_dtype == a.dtype) {
      without_bias(residual, static_cast<const T*>(a.target) + at, bias, width);
    } else {
      without_bias(residual, static_cast<const float*>(a.target) + at, bias, width);
    }
    const int64_t begin = bounds[2 * g];
    add_rows(residual, row.coef.data + begin, row.rows.data + begin, bounds[2 * g + 1] - begin, width);
    sse[g] += dot_rows(residual, residual, width);
  }
  write_row(static_cast<T*>(a.residual) + at, acc + (groups - 1) * width, width);
  if (!a.mixed && !a.dots) return;
  for (int64_t g = groups - 1; g >= 0; --g) {
    float* mixed = acc + g * width;
    if (groups > 1) mix_rows(mixed, a.mix[g], g + 1 < groups ? mixed + width : nullptr, width);
    if (a.mixed) write_row(static_cast<T*>(a.mixed) + g * a.codes.n * a.d + at, mixed, width);
    if (!a.dots) continue;
    const int64_t begin = bounds[2 * g], count = bounds[2 * g + 2] - begin;
    add_dots(row.rows.data + begin, mixed, row.dots.data + begin, count, width);
  }
}

void decode_loss(const DecodeLossArgs& a) {
  const int64_t n = a.codes.n, groups = a.nesting.groups;
  const int64_t used = a.codes.offsets ? a.codes.offsets[n] : n * a.codes.width;
  Scratch<float> sse(n * groups);
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(n, 16, a.threads, [&](int64_t begin, int64_t end) {
      GroupedRow<T> row(widest_row(a.codes, begin, end), groups);
      Scratch<float> acc(groups * block_columns(0, groups, sizeof(T), a.d));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = a.codes.offsets ? a.codes.offsets[i] : i * a.codes.width;
        const int64_t last = a.codes.offsets ? a.codes.offsets[i + 1] : first + a.codes.width;
        row.fill(a, first, last, used);
        float* sums = sse.data + i * groups;
        for (int64_t g = 0; g < groups; ++g) sums[g] = 0.0f;
        const int64_t columns = block_columns(row.count, groups, sizeof(T), a.d);
        for (int64_t c = 0; c < a.d; c += columns) {
          loss_block(a, i, c, columns < a.d - c ? columns : a.d - c, row, acc.data, sums);
          for (int64_t e = 0; e < row.count && c + columns < a.d; ++e) row.rows.data[e] += columns;
        }
        for (int64_t e = 0; a.dots && e < row.count; ++e) a.dots[row.place.data[e]] = row.dots.data[e];
      }
    });
  });
  for (int64_t g = 0; g < groups; ++g) {  // in one order, whatever the threads
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += sse.data[i * groups + g];
    a.sse[g] = static_cast<float>(total);
  }
}
