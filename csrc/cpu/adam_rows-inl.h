// SPDX-License-Identifier: Apache-2.0
// One Adam step of latent rows: a single pass over parameter and moments, the gradient read once.

template <class T>
inline void adam_row(const AdamRowsArgs& a, int64_t row, const T* g, float* updated) {
  T* w = static_cast<T*>(a.param) + row * a.d;
  float* mean = a.exp_avg + row * a.d;
  float* square = a.exp_avg_sq + row * a.d;
  float along = 0.0f;  // the gradient's component along the row, per unit of the row
  if (g && a.project) {
    const float length2 = dot_rows(w, w, a.d);
    if (length2 > 0.0f) along = dot_rows(g, w, a.d) / length2;
  }
  const V v_along = set1(along), v_l2 = set1(a.l2), v_decay = set1(a.decay), v_step = set1(a.step_size);
  const V rise = set1(a.one_minus_beta1), keep = set1(a.beta2), add2 = set1(a.one_minus_beta2);
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
    if (a.renormalise) {
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
    square[j] = __builtin_fmaf(a.one_minus_beta2 * grad, grad, a.beta2 * square[j]);
    const float denominator = __builtin_sqrtf(square[j]) / a.root_correction2 + a.eps;
    weight -= a.step_size * mean[j] / denominator;
    if (a.renormalise) {
      tail2 = __builtin_fmaf(weight, weight, tail2);
      updated[j] = weight;
    } else {
      put(w + j, weight);
    }
  }
  if (!a.renormalise) return;
  const float length = __builtin_sqrtf(sum(length2) + tail2);
  const float scale = length > 0.0f ? 1.0f / length : 1.0f;
  const V v_scale = set1(scale);
  for (j = 0; j + N <= a.d; j += N) store(w + j, mul(load(updated + j), v_scale));
  for (; j < a.d; ++j) put(w + j, updated[j] * scale);
}

void adam_rows(const AdamRowsArgs& a) {
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* grad = static_cast<const T*>(a.grad);
    parallel_for(a.masked ? a.u : a.m, 64, a.threads, [&](int64_t begin, int64_t end) {
      Scratch<float> updated(a.d);
      if (a.masked || !a.rows) {
        for (int64_t i = begin; i < end; ++i) adam_row<T>(a, a.masked ? a.rows[i] : i, grad + i * a.d, updated.data);
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
        adam_row<T>(a, row, has ? grad + next++ * a.d : nullptr, updated.data);
      }
    });
  });
}
