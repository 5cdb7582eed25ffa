// SPDX-License-Identifier: Apache-2.0
// Residuals of nested reconstructions, their squares, and what the values' gradients need. A block has a row: it gathers
// the decoder rows once for the residuals, which stay on chip, and meets the same rows again for the dots, in shared
// memory where they fit.
#include "cuda/gather.cuh"

namespace fusae::cuda {
namespace {

constexpr int MAX_WARPS = 8;

// The dot of a row in float and one of weights, in every lane of a warp.
template <class T, int V, class S>
__device__ inline float warp_dot(const S* a, const T* b, int64_t d) {
  float dot = 0.0f;
  for (int64_t c = static_cast<int64_t>(threadIdx.x % 32) * V; c < d; c += 32 * V) {
    const Pack<T, V> right = load<T, V>(b + c);
    if constexpr (std::is_same_v<S, T>) {
      const Pack<S, V> left = load<S, V>(a + c);
#pragma unroll
      for (int i = 0; i < V; ++i) dot = fmaf(to_float(left.item[i]), to_float(right.item[i]), dot);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) dot = fmaf(a[c + i], to_float(right.item[i]), dot);
    }
  }
  return warp_sum(dot);
}

template <class T, int V>
__global__ void __launch_bounds__(256) dots_kernel(const __grid_constant__ DotsArgs a) {
  const int64_t row = blockIdx.x;
  const Range range = entries_of(a.entries, row);
  const float scale = a.scale ? *a.scale : 1.0f;
  for (int64_t e = range.first + threadIdx.x / 32; e < range.last; e += blockDim.x / 32) {
    const int32_t latent = a.entries.codes.indices[e];
    float dot = 0.0f;
    if (latent >= 0 && latent < a.entries.m) {
      const int64_t group = a.groups.count > 1 ? group_of(a.groups, latent, e - range.first) : 0;
      const T* source = static_cast<const T*>(a.source) + (group * a.entries.codes.n + row) * a.d;
      dot = scale * warp_dot<T, V>(source, static_cast<const T*>(a.weight) + latent * a.d, a.d);
    }
    if (threadIdx.x % 32 == 0) put(a.out, a.out_dtype, e, dot);
  }
}

// Stages the entries [first, last), with their groups.
template <class T>
__device__ inline void stage_groups(Stage<T>& stage, uint8_t* group, const LossArgs& a, int64_t begin, int64_t first,
                                    int count) {
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
    stage_entry(stage, e, a.entries, first + e, static_cast<const T*>(a.weight), a.d);
    stage.coef[e] = -stage.coef[e];  // what the row takes from the residual
    group[e] = 0;
    if (a.groups.count > 1)
      group[e] = static_cast<uint8_t>(group_of(a.groups, a.entries.codes.indices[first + e], first + e - begin));
  }
  __syncthreads();
}

// `near`: residuals of the groups are kept in shared memory, not in a.kept. `cached`: so are up to that many rows.
template <class T, int V>
__global__ void __launch_bounds__(256, 2) loss_kernel(const __grid_constant__ LossArgs a, bool near, int cached) {
  FUSAE_DYNAMIC_SHARED(shared);
  __shared__ Stage<T> stage;
  __shared__ uint8_t group[STAGE];
  __shared__ float squares[MAX_WARPS][MAX_GROUPS];
  const int64_t row = blockIdx.x, n = a.entries.codes.n;
  const int groups = a.groups.count, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Range range = entries_of(a.entries, row);
  const int64_t count = range.last - range.first;
  const bool keep = a.dots || a.mixed;
  // Residual of group g: at kept + g * kept_stride.
  float* kept = near ? reinterpret_cast<float*>(shared) : a.kept + row * a.d;
  const int64_t kept_stride = near ? a.d : n * a.d;
  T* rows = reinterpret_cast<T*>(shared + (near ? groups * a.d * static_cast<int64_t>(sizeof(float)) : 0));
  const T* other = static_cast<const T*>(a.weight);
  const bool whole = count <= STAGE;
  if (count > cached) cached = 0;
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x))
    for (int w = 0; w < MAX_WARPS; ++w) squares[w][g] = 0.0f;
  if (whole) stage_groups(stage, group, a, range.first, range.first, static_cast<int>(count > 0 ? count : 0));
  __syncthreads();

  for (int64_t base = 0; base < a.d; base += static_cast<int64_t>(blockDim.x) * V) {
    const int64_t column = base + static_cast<int64_t>(threadIdx.x) * V;
    const bool mine = column < a.d;
    float acc[V] = {};
    if (mine) {
#pragma unroll
      for (int i = 0; i < V; ++i) acc[i] = get(a.target, a.target_dtype, row * a.d + column + i);
      if (a.bias) {
        const Pack<T, V> bias = load<T, V>(static_cast<const T*>(a.bias) + column);
#pragma unroll
        for (int i = 0; i < V; ++i) acc[i] -= to_float(bias.item[i]);
      }
    }
    for (int g = 0; g < groups; ++g) {
      for (int64_t first = range.first; first < range.last; first += STAGE) {
        const int some = static_cast<int>(range.last - first < STAGE ? range.last - first : STAGE);
        if (!whole) stage_groups(stage, group, a, range.first, first, some);
        if (!mine) continue;
        for (int e = 0; e < some; e += FLIGHT) {
          Pack<T, V> row_of[FLIGHT];
          float coef[FLIGHT];
#pragma unroll
          for (int u = 0; u < FLIGHT; ++u) {
            const int place = e + u < some ? e + u : some - 1;
            coef[u] = e + u < some && group[place] == g ? stage.coef[place] : 0.0f;
            row_of[u] = load<T, V>((coef[u] != 0.0f ? stage.row[place] : other) + column);  // as in add_rows
          }
#pragma unroll
          for (int u = 0; u < FLIGHT; ++u) {
            if (coef[u] == 0.0f) continue;
            if (cached)
              *reinterpret_cast<decltype(row_of[u].raw)*>(rows + (e + u) * a.d + column) = row_of[u].raw;
#pragma unroll
            for (int i = 0; i < V; ++i) acc[i] = fmaf(coef[u], to_float(row_of[u].item[i]), acc[i]);
          }
        }
      }
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < V; ++i) square = fmaf(acc[i], acc[i], square);
      square = warp_sum(square);
      if (lane == 0) squares[warp][g] += square;
      if (keep && mine) {
#pragma unroll
        for (int i = 0; i < V; ++i) kept[g * kept_stride + column + i] = acc[i];
      }
    }
    if (!mine) continue;
    store<T, V>(static_cast<T*>(a.residual) + row * a.d + column, acc);
    if (!keep || groups == 1) continue;
    float mix[V] = {};
    for (int g = groups - 1; g >= 0; --g) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float* r = kept + g * kept_stride + column + i;
        mix[i] = g == groups - 1 ? a.mix[g] * *r : fmaf(a.mix[g], *r, mix[i]);
        *r = mix[i];
      }
      if (a.mixed) store<T, V>(static_cast<T*>(a.mixed) + (g * n + row) * a.d + column, mix);
    }
  }

  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
    for (int w = 0; w < MAX_WARPS; ++w) total += squares[w][g];
    a.squares[g * n + row] = total;
  }
  if (!a.dots) return;
  for (int64_t e = warp; e < count; e += blockDim.x / 32) {
    const int32_t latent = a.entries.codes.indices[range.first + e];
    float dot = 0.0f;
    if (latent >= 0 && latent < a.entries.m) {
      const int g = groups > 1 ? group_of(a.groups, latent, e) : 0;
      const bool here = cached && stage.coef[e] != 0.0f;  // rows of coefficient 0 were not read
      const T* weight = here ? rows + e * a.d : static_cast<const T*>(a.weight) + latent * a.d;
      dot = warp_dot<T, V>(kept + g * kept_stride, weight, a.d);
    }
    if (lane == 0) a.dots[range.first + e] = dot;
  }
}

}  // namespace

void dots(const DotsArgs& a, Stream stream) {
  const Shape shape = {{"n", a.entries.codes.n}, {"d", a.d}, {"m", a.entries.m}, {"entries", a.entries.storage}};
  visit_vectors(a.dtype, a.d, address(a.source) | address(a.weight), [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("value gradients", shape, dots_kernel<T, decltype(width)::value>, {a.entries.codes.n, 1, 256}, stream, a);
  });
}

void decode_loss(const LossArgs& a, Stream stream) {
  const Shape shape = {{"n", a.entries.codes.n}, {"d", a.d},           {"m", a.entries.m},
                       {"entries", a.entries.storage}, {"prefixes", a.groups.count}};
  const uintptr_t together = address(a.weight) | address(a.bias) | address(a.residual) | address(a.mixed);
  visit_vectors(a.dtype, a.d, together, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = decltype(width)::value;
    const LossPlan plan = loss_plan(a.d, a.groups.count, a.entries.codes.offsets ? 0 : a.entries.codes.width, sizeof(T),
                                    a.dots || a.mixed, a.dots != nullptr, STAGE, shared_limit());
    if (!plan.near && !a.kept && (a.dots || a.mixed))
      throw std::invalid_argument("decode_loss: these residuals need scratch memory");
    launch("decode_loss", shape, loss_kernel<T, V>,
           {a.entries.codes.n, 1, gather_plan(a.d, V).threads, static_cast<size_t>(plan.bytes)}, stream, a, plan.near,
           plan.cached);
  });
}

}  // namespace fusae::cuda
