// SPDX-License-Identifier: Apache-2.0
// One Adam step of latent rows: a block has a row, a warp 256 columns of it at a time. Parameter, moments and gradient
// cross memory once; projecting the gradient reads it and the weights a second time, from cache.
#include "cuda/moments.cuh"

namespace fusae::cuda {
namespace {

constexpr int MAX_THREADS = 256;

// T: of the parameter and its gradient. With a master, that is what is updated, and the parameter its rounded copy.
template <class T, int V>
__global__ void __launch_bounds__(MAX_THREADS, 2) adam_kernel(const __grid_constant__ AdamRowsArgs a) {
  FUSAE_DYNAMIC_SHARED(shared);
  __shared__ float parts[32];
  float* updated = reinterpret_cast<float*>(shared);  // the row, where weights are not final yet
  const bool only_rows = a.masked || a.last_step;
  const int64_t row = only_rows ? a.rows[blockIdx.x] : blockIdx.x;
  const T* grad = static_cast<const T*>(a.grad);
  if (only_rows || !a.rows) {
    grad += static_cast<int64_t>(blockIdx.x) * a.d;
  } else {
    int64_t low = 0, high = a.u;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (a.rows[mid] < row) low = mid + 1; else high = mid;
    }
    grad = low < a.u && a.rows[low] == row ? grad + low * a.d : nullptr;
  }
  T* param = static_cast<T*>(a.param) + row * a.d;
  float* master = a.master ? a.master + row * a.d : nullptr;
  const int64_t blocks = cdiv(a.d, MOMENT_BLOCK), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto read_weights = [&](float (&out)[OWN], int64_t block) {
    if (master) {
      read_columns<V>(out, master, block, a.d);
    } else {
      read_columns<V>(out, param, block, a.d);
    }
  };

  float along = 0.0f;  // the gradient's component along the row, per unit of the row
  if (grad && a.project) {
    float length2 = 0.0f, dot = 0.0f;
    for (int64_t b = warp; b < blocks; b += warps) {
      float w[OWN], g[OWN];
      read_weights(w, b);
      read_columns<V>(g, grad, b, a.d);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        length2 = fmaf(w[i], w[i], length2);
        dot = fmaf(w[i], g[i], dot);
      }
    }
    length2 = block_sum(length2, parts);
    dot = block_sum(dot, parts);
    if (length2 > 0.0f) along = dot / length2;
  }
  float kept = a.beta2;  // with the decay of the steps without a gradient, which was put off
  if (a.last_step) {
    kept = static_cast<float>(pow(a.beta2_exact, static_cast<double>(a.step - a.last_step[row])));
    __syncthreads();
    if (threadIdx.x == 0) a.last_step[row] = static_cast<int32_t>(a.step);
  }
  const uint64_t key = mix64(mix64(a.key) + static_cast<uint64_t>(row + a.first_row) * 0xD1B54A32D192ED03u);
  const uint32_t moment_key = static_cast<uint32_t>(key), weight_key = static_cast<uint32_t>(key >> 32);
  const bool aside = a.renormalise;
  float length2 = 0.0f;

  const auto finish = [&](const float (&w)[OWN], int64_t b) {
    if (master) write_columns<V>(master, w, b, a.d);
    if constexpr (std::is_same_v<T, bf16>) {
      if (a.stochastic) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          const int64_t c = column_of<V>(b, i);
          if (c < a.d) param[c] = random_bf16(w[i], random_bits(weight_key, c));
        }
        return;
      }
    }
    write_columns<V>(param, w, b, a.d);
  };

  for (int64_t b = warp; b < blocks; b += warps) {
    float w[OWN], g[OWN] = {}, mean[OWN] = {}, square[OWN];
    read_weights(w, b);
    if (grad) read_columns<V>(g, grad, b, a.d);
    // Without a first moment beta1 is 0 and what was in memory does not matter, but that it is a number.
    if (a.exp_avg) read_moments<true, V>(mean, a.exp_avg, a.avg_type, row, b, a.d);
    read_moments<false, V>(square, a.exp_avg_sq, a.avg_sq_type, row, b, a.d);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float slope = (g[i] - along * w[i]) + a.l2 * w[i];
      mean[i] = fmaf(slope - mean[i], a.one_minus_beta1, mean[i]);
      square[i] = fmaf(a.one_minus_beta2 * slope, slope, kept * square[i]);
      const float denominator = sqrtf(square[i]) / a.root_correction2 + a.eps;
      w[i] = w[i] * a.decay - a.step_size * mean[i] / denominator;
    }
    if (a.exp_avg) write_moments<true, V>(a.exp_avg, a.avg_type, row, b, a.d, mean, moment_key);
    write_moments<false, V>(a.exp_avg_sq, a.avg_sq_type, row, b, a.d, square, moment_key);
    if (!aside) {
      finish(w, b);
      continue;
    }
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t c = column_of<V>(b, i);
      if (c >= a.d) continue;
      updated[c] = w[i];
      length2 = fmaf(w[i], w[i], length2);
    }
  }
  if (!aside) return;
  const float length = sqrtf(block_sum(length2, parts));
  const float scale = length > 0.0f ? 1.0f / length : 1.0f;
  for (int64_t b = warp; b < blocks; b += warps) {
    float w[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int64_t c = column_of<V>(b, i);
      w[i] = c < a.d ? updated[c] * scale : 0.0f;  // written by this thread
    }
    finish(w, b);
  }
}

}  // namespace

void adam_rows(const AdamRowsArgs& a, Stream stream) {
  const Shape shape = {{"m", a.m}, {"d", a.d}, {"rows", a.u}};
  const int64_t shared = a.renormalise ? 4 * a.d : 0;
  if (shared > shared_limit() - 1024)
    throw std::invalid_argument("adam_rows_: rows of " + std::to_string(a.d) +
                                " elements are too long to be renormalised on this GPU");
  const int threads = static_cast<int>(32 * (cdiv(a.d, 256) < MAX_THREADS / 32 ? cdiv(a.d, 256) : MAX_THREADS / 32));
  const int64_t rows = a.masked || a.last_step ? a.u : a.m;
  const uintptr_t together = address(a.param) | address(a.grad) | address(a.master) |
                             (a.avg_type == Moments::codes ? 0 : address(a.exp_avg)) |
                             (a.avg_sq_type == Moments::codes ? 0 : address(a.exp_avg_sq));
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.d % 4 == 0 && together % 16 == 0) {
      launch("adam_rows_", shape, adam_kernel<T, 4>, {rows, 1, threads, static_cast<size_t>(shared)}, stream, a);
    } else {
      launch("adam_rows_", shape, adam_kernel<T, 1>, {rows, 1, threads, static_cast<size_t>(shared)}, stream, a);
    }
  });
}

}  // namespace fusae::cuda
