// SPDX-License-Identifier: Apache-2.0
// `encode_topk` in one pass over the products: sample, gate, certify, repair. No [n, m], no host sync.
//
// 1. The scores of a few latents give every row a bound (`StoreScores`, `row_bounds`).
// 2. A persistent GEMM; what reaches its row's bound is appended to the row's buffer (`GateTopk`). Atomic additions hand
//    out the places; keys are unique, so their order doesn't matter.
// 3. A row whose count is at least k and fits the buffer has all of its k best in there, whatever the sample was: they
//    become its codes (`finish_rows`). Any other row goes on a list on the device.
// 4. Rows on the list, exactly, by a bound that rises with what was seen (`repair_scan`, `repair_merge`).
// Without a sample every row is on the list. A second selection (AuxK) has its own bounds and buffers in the same pass.
#include "cuda/encode_gemm.cuh"
#include "cuda/encode_repair.cuh"
#include "fusae/cuda_encode_plan.h"

namespace fusae::cuda {
namespace {

__global__ void __launch_bounds__(256) list_all(Selection s, int64_t n) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < n) s.list[row] = static_cast<int32_t>(row);
  if (row == 0) *s.failed = static_cast<int32_t>(n);
}

template <int ITEMS>
void bounds(const EncodeTopkArgs& a, const Selection& s, Shape shape, Stream stream) {
  launch("encode_topk", shape, row_bounds<ITEMS>, {a.in.n, 1, 512, sizeof(Exchange)}, stream,
         static_cast<const float*>(a.scores), static_cast<int>(a.sampled), sample_step(a.in.m, a.sampled), s);
}

void find_bounds(const EncodeTopkArgs& a, const Selection& s, Shape shape, Stream stream) {
  if (a.sampled <= 1024) {
    bounds<2>(a, s, shape, stream);
  } else if (a.sampled <= 4096) {
    bounds<8>(a, s, shape, stream);
  } else {
    bounds<32>(a, s, shape, stream);  // 16384 at most
  }
}

void finish(const EncodeTopkArgs& a, const Selection& s, Shape shape, Stream stream) {
  visit(a.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.sampled) {
      launch("encode_topk", shape, finish_rows<T>, {a.in.n, 1, 128, sizeof(Exchange) + static_cast<size_t>(s.cap) * 8}, stream,
             a.in, s, a.relu);
    } else {
      launch("encode_topk", shape, list_all, {cdiv(a.in.n, 256), 1, 256}, stream, s, a.in.n);
    }
  });
  portable::visit_elements(a.in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("encode_topk", shape, portable::repair_scan<T>,
           {portable_blocks(a.in.n, 128 * s.splits, a.in.processors), 1, portable::THREADS, sizeof(portable::RepairShared)},
           stream, a.in, s);
  });
  visit(a.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t most = 4 * static_cast<int64_t>(a.in.processors), blocks = a.in.n < most ? a.in.n : most;
    launch("encode_topk", shape, portable::repair_merge<T>,
           {blocks, 1, portable::THREADS, sizeof(Exchange) + portable::MERGED * sizeof(Entry)}, stream, a.in, s, a.relu);
  });
}

Bounds bounds_of(const Selection& s) { return {s.bound, s.last, s.tally, s.entries, s.cap}; }

}  // namespace

void encode_topk(const EncodeTopkArgs& a, void* stream) {
  const Shape shape = {{"n", a.in.n}, {"d", a.in.d}, {"m", a.in.m}, {"k", a.main.k}, {"k_aux", a.aux.k}};
  if (a.in.n == 0) return;
  const Selection& first = a.main.k ? a.main : a.aux;  // the auxiliary selection of a batch top-k is alone
  const bool both = a.main.k && a.aux.k;
  if (a.sampled) {
    const int32_t step = sample_step(a.in.m, a.sampled);
    gemm(a.in, StoreArgs{a.scores, a.sampled, step}, {"encode_topk", a.sampled, step, nullptr, stream});
    find_bounds(a, first, shape, stream);
    if (both) find_bounds(a, a.aux, shape, stream);
    gemm(a.in, GateTopkArgs{bounds_of(first), both ? bounds_of(a.aux) : Bounds{}, first.mask, both ? a.aux.mask : nullptr},
         {"encode_topk", a.in.m, 0, nullptr, stream});
  }
  finish(a, first, shape, stream);
  if (both) finish(a, a.aux, shape, stream);
}

// --- the best of every group ---------------------------------------------------------------------------------------

namespace {

__global__ void __launch_bounds__(256) clear_best(Entry* best, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) best[i] = 0;
}

template <class T>
__global__ void __launch_bounds__(256) write_best(const Entry* best, const float* pre, int64_t count, bool relu, T* values,
                                                  int32_t* indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  values[i] = code_value<T>(pre ? pre[i] : from_order_bits(static_cast<uint32_t>(best[i] >> 32)), relu);
  indices[i] = key_latent(best[i]);
}

}  // namespace

void encode_group_max(const GroupMaxArgs& a, void* stream) {
  const Shape shape = {{"n", a.in.n}, {"d", a.in.d}, {"m", a.in.m}, {"k", a.k}};
  const int64_t count = a.in.n * a.k;
  const GemmLaunch l{"encode_topk", a.in.m, 0, nullptr, stream};
  launch("encode_topk", shape, clear_best, {cdiv(count, 256), 1, 256}, stream, a.best, count);
  gemm(a.in, GroupMaxPass{a.best, nullptr, a.k, a.in.m / a.k}, l);
  // A score that was scaled does not tell the pre-activation: a second pass fetches it.
  if (a.in.norms) gemm(a.in, GroupMaxPass{a.best, a.pre, a.k, a.in.m / a.k}, l);
  visit(a.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("encode_topk", shape, write_best<T>, {cdiv(count, 256), 1, 256}, stream, static_cast<const Entry*>(a.best),
           static_cast<const float*>(a.in.norms ? a.pre : nullptr), count, a.relu, static_cast<T*>(a.values), a.indices);
  });
}

}  // namespace fusae::cuda
