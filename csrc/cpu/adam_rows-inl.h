// SPDX-License-Identifier: Apache-2.0
// One Adam step of latent rows: a single pass over parameter and moments, the gradient read once.

// What one thread needs for a row.
struct AdamScratch {
  explicit AdamScratch(int64_t d) : updated(d), mean(d), square(d), bits(d) {}
  Scratch<float> updated, mean, square;
  Scratch<uint32_t> bits;
};

// T: of the parameter and its gradient. W: of the weight that is updated, the parameter's own or its master's.
template <class T, class W>
inline void adam_row(const AdamRowsArgs& a, int64_t row, const T* g, AdamScratch& s) {
  T* param = static_cast<T*>(a.param) + row * a.d;
  W* w = a.master ? reinterpret_cast<W*>(a.master + row * a.d) : reinterpret_cast<W*>(param);
  float* updated = s.updated.data;
  float* square = open_moments<false>(a.exp_avg_sq, a.avg_sq_type, row, a.d, s.square.data);
  // Without a first moment beta1 is 0 and what was in memory does not matter, but that it is a number.
  float* mean = s.mean.data;
  if (a.exp_avg) {
    mean = open_moments<true>(a.exp_avg, a.avg_type, row, a.d, mean);
  } else {
    std::memset(mean, 0, static_cast<size_t>(a.d) * sizeof(float));
  }
  float along = 0.0f;  // the gradient's component along the row, per unit of the row
  if (g && a.project) {
    const float length2 = dot_rows(w, w, a.d);
    if (length2 > 0.0f) {
      float dot = 0.0f;
      if constexpr (std::is_same_v<T, W>) {
        dot = dot_rows(g, w, a.d);
      } else {
        for (int64_t j = 0; j < a.d; ++j) updated[j] = get(g + j);
        dot = dot_rows(updated, reinterpret_cast<float*>(w), a.d);
      }
      along = dot / length2;
    }
  }
  float kept = a.beta2;  // with the decay of the steps without a gradient, which was put off
  if (a.last_step) {
    kept = static_cast<float>(__builtin_pow(a.beta2_exact, static_cast<double>(a.step - a.last_step[row])));
    a.last_step[row] = static_cast<int32_t>(a.step);
  }
  const bool aside = a.renormalise || a.stochastic;  // the weights are not final yet
  const V v_along = set1(along), v_l2 = set1(a.l2), v_decay = set1(a.decay), v_step = set1(a.step_size);
  const V rise = set1(a.one_minus_beta1), keep = set1(kept), add2 = set1(a.one_minus_beta2);
  const V root2 = set1(a.root_correction2), eps = set1(a.eps);
  V length2 = zero();
  int64_t j = 0;
  for (; j + N <= a.d; j += N) {
    V weight = load(w + j);
    V grad = g ? load(g + j) : zero();
    grad = sub(grad, mul(v_along, weight));
    grad = add(grad, mul(v_l2, weight));
    weight = mul(weight, v_decay);
    V m1 = load(mean + j), m2 = load(square + j);
    m1 = fma(sub(grad, m1), rise, m1);
    m2 = fma(mul(add2, grad), grad, mul(keep, m2));
    store(mean + j, m1);
    store(square + j, m2);
    const V denominator = add(div(root(m2), root2), eps);
    weight = sub(weight, div(mul(v_step, m1), denominator));
    if (aside) {
      length2 = fma(weight, weight, length2);
      store(updated + j, weight);
    } else {
      store(w + j, weight);
    }
  }
  float tail2 = 0.0f;
  for (; j < a.d; ++j) {
    float weight = get(w + j);
    float grad = (g ? get(g + j) : 0.0f) - along * weight;
    grad += a.l2 * weight;
    weight *= a.decay;
    mean[j] = __builtin_fmaf(grad - mean[j], a.one_minus_beta1, mean[j]);
    square[j] = __builtin_fmaf(a.one_minus_beta2 * grad, grad, kept * square[j]);
    const float denominator = __builtin_sqrtf(square[j]) / a.root_correction2 + a.eps;
    weight -= a.step_size * mean[j] / denominator;
    if (aside) {
      tail2 = __builtin_fmaf(weight, weight, tail2);
      updated[j] = weight;
    } else {
      put(w + j, weight);
    }
  }
  const uint64_t key = mix64(a.key + static_cast<uint64_t>(row + a.first_row) * 0xD1B54A32D192ED03u);
  const bool narrow = (a.exp_avg && a.avg_type != Moments::f32) || a.avg_sq_type != Moments::f32;
  if (narrow) {
    random_bits(s.bits.data, static_cast<uint32_t>(key), a.d);
    if (a.exp_avg) close_moments<true>(a.exp_avg, a.avg_type, row, a.d, mean, s.bits.data);
    close_moments<false>(a.exp_avg_sq, a.avg_sq_type, row, a.d, square, s.bits.data);
  }
  if (aside) {
    const float length = __builtin_sqrtf(sum(length2) + tail2);
    const float scale = a.renormalise && length > 0.0f ? 1.0f / length : 1.0f;
    const V v_scale = set1(scale);
    if constexpr (std::is_same_v<T, bf16> && std::is_same_v<W, bf16>) {
      if (a.stochastic) {
        for (j = 0; j < a.d; ++j) updated[j] *= scale;
        random_bits(s.bits.data, static_cast<uint32_t>(key >> 32), a.d);
        write_bf16<0>(w, updated, s.bits.data, a.d);
        return;
      }
    }
    for (j = 0; j + N <= a.d; j += N) store(w + j, mul(load(updated + j), v_scale));
    for (; j < a.d; ++j) put(w + j, updated[j] * scale);
  }
  if constexpr (!std::is_same_v<T, W>) {
    for (j = 0; j + N <= a.d; j += N) store(param + j, load(w + j));
    for (; j < a.d; ++j) put(param + j, get(w + j));
  }
}

inline void prefetch_bytes(const void* base, int64_t from, int64_t bytes) {
  if (!base) return;
  const char* p = static_cast<const char*>(base) + from;
  for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(p + j, 1, 2);
}

// Rows of a sparse gradient lie anywhere: no hardware foresees the next one.
template <class T>
inline void prefetch_row(const AdamRowsArgs& a, int64_t row) {
  const auto width = [&](Moments type) {
    if (type == Moments::codes) return a.d + (a.d + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
    return type == Moments::f32 ? 4 * a.d : 2 * a.d;
  };
  const int64_t own = static_cast<int64_t>(sizeof(T)) * a.d, first = width(a.avg_type), second = width(a.avg_sq_type);
  prefetch_bytes(a.param, row * own, own);
  prefetch_bytes(a.exp_avg, row * first, first);
  prefetch_bytes(a.exp_avg_sq, row * second, second);
  prefetch_bytes(a.master, row * 4 * a.d, 4 * a.d);
}

template <class T, class W>
inline void adam_all_rows(const AdamRowsArgs& a) {
  const T* grad = static_cast<const T*>(a.grad);
  const bool only_rows = a.masked || a.last_step;
  parallel_for(only_rows ? a.u : a.m, 64, a.threads, [&](int64_t begin, int64_t end) {
    AdamScratch scratch(a.d);
    if (only_rows || !a.rows) {
      for (int64_t i = begin; i < end; ++i) {
        if (only_rows && i + 1 < end) prefetch_row<T>(a, a.rows[i + 1]);
        adam_row<T, W>(a, only_rows ? a.rows[i] : i, grad + i * a.d, scratch);
      }
      return;
    }
    // A row-sparse gradient of every row: find where this block's rows begin in it, then walk along.
    int64_t next = 0, high = a.u;
    while (next < high) {
      const int64_t mid = (next + high) / 2;
      if (a.rows[mid] < begin) next = mid + 1; else high = mid;
    }
    for (int64_t row = begin; row < end; ++row) {
      const bool has = next < a.u && a.rows[next] == row;
      adam_row<T, W>(a, row, has ? grad + next++ * a.d : nullptr, scratch);
    }
  });
}

void adam_rows(const AdamRowsArgs& given) {
  AdamRowsArgs a = given;
  a.key = mix64(given.key);
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.master) {
      adam_all_rows<T, float>(a);
    } else {
      adam_all_rows<T, T>(a);
    }
  });
}
