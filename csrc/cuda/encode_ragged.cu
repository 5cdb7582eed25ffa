// SPDX-License-Identifier: Apache-2.0
// `encode_threshold` and `encode_batch_topk`: one pass over the products puts what passes into a pool; then every entry
// goes where it belongs, by the counts of the rows and the order of latents. What a pool could not hold, or could not
// prove, is found in further passes that the device itself decides on.
#include "cuda/encode_gemm.cuh"
#include "cuda/encode_ragged.cuh"

namespace fusae::cuda {
namespace {

int64_t list_blocks(int64_t length, int processors) {
  const int64_t blocks = cdiv(length, 256), most = 8 * static_cast<int64_t>(processors);
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

void clear(const char* op, const Pool& pool, int64_t n, const int32_t* run, Stream stream) {
  launch(op, {{"n", n}}, clear_pool, {cdiv(n, 256), 1, 256}, stream, pool, n, run);
}

}  // namespace

// --- thresholds --------------------------------------------------------------------------------------------------------

void threshold_find(const EncodeThresholdArgs& a, void* stream) {
  if (a.in.n == 0) return;
  clear("encode_threshold", a.pool, a.in.n, nullptr, stream);
  gemm(a.in, GateRaggedArgs{a.threshold, a.half_window, a.above, nullptr, a.pool, nullptr, 0},
       {"encode_threshold", a.in.m, 0, nullptr, stream});
}

void threshold_write(const ThresholdWriteArgs& a, void* stream) {
  const EncodeInput& in = a.find.in;
  const Shape shape = {{"n", in.n}, {"d", in.d}, {"m", in.m}, {"capacity", a.capacity}};
  if (in.n == 0 || a.capacity == 0) return;
  int32_t* const flag = a.again + in.n;
  Pool again = a.find.pool;
  again.count = a.again;
  launch("encode_threshold", shape, threshold_again, {1, 1, 32}, stream, a.find.pool, flag);
  clear("encode_threshold", again, in.n, flag, stream);
  gemm(in, GateRaggedArgs{a.find.threshold, a.find.half_window, nullptr, nullptr, again, a.offsets, a.capacity},
       {"encode_threshold", in.m, 0, flag, stream});
  launch("encode_threshold", shape, place_found, {list_blocks(again.cap, in.processors), 1, 256}, stream, again, a.offsets);
  visit(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("encode_threshold", shape, threshold_rows<T>, {in.n, 1, RANK_THREADS, sizeof(RankShared)}, stream, in,
           a.find.threshold, a.find.half_window, static_cast<const Entry*>(again.entries), a.offsets,
           static_cast<T*>(a.values), a.indices, a.state, a.capacity);
  });
}

// --- the best of a batch -----------------------------------------------------------------------------------------------

void encode_batch_topk(const EncodeBatchArgs& a, void* stream) {
  const EncodeInput& in = a.in;
  const int64_t n = in.n, wanted = n * a.k;
  const Shape shape = {{"n", n}, {"d", in.d}, {"m", in.m}, {"k", a.k}};
  const char* const op = "encode_batch_topk";
  if (n == 0) return;
  const float* const nothing = nullptr;
  const int64_t lists = list_blocks(a.pool.cap, in.processors);
  const auto count = [&](const float* scores, int64_t length, int shift) {
    launch(op, shape, count_list, {list_blocks(scores ? length : a.pool.cap, in.processors), 1, 256, 1024}, stream, scores, length,
           a.pool, in, static_cast<const BatchState*>(a.state), a.bins, shift, a.equal);
  };
  const auto pick = [&](int shift) {
    launch(op, shape, pick_digit, {1, 1, 256, sizeof(Exchange)}, stream, a.state, a.bins, shift);
  };
  // A bound from the sample, and what reaches it.
  launch(op, shape, batch_begin, {1, 1, 32}, stream, a.state, wanted, a.rank, n);
  launch(op, shape, clear_bins, {1, 1, 256}, stream, a.bins);
  clear(op, a.pool, n, nullptr, stream);
  if (a.sampled) {
    const int32_t step = sample_step(in.m, a.sampled);
    gemm(in, StoreArgs{a.scores, a.sampled, step}, {op, a.sampled, step, nullptr, stream});
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(a.scores, n * a.sampled, shift);
      pick(shift);
    }
    gemm(in, GateRaggedArgs{nullptr, 0.0f, nullptr, a.state, a.pool, nullptr, 0}, {op, in.m, 0, nullptr, stream});
  }
  // The pivot: the last score that is selected. In the pool if that is proved to hold it, else by all of its bits from
  // the products themselves, four passes; and then the pool is filled again, by the pivot.
  launch(op, shape, batch_certify, {cdiv(n, 256), 1, 256}, stream, a.state, a.pool, a.equal, n);
  const int32_t* const failed = &a.state->failed;
  for (int shift = 24; shift >= 0; shift -= 8) {
    count(nothing, 0, shift);
    gemm(in, CountArgs{a.state, a.bins, shift, a.equal}, {op, in.m, 0, failed, stream});
    pick(shift);
  }
  count(nothing, 0, -1);
  gemm(in, CountArgs{a.state, a.bins, -1, a.equal}, {op, in.m, 0, failed, stream});
  launch(op, shape, batch_last_row, {1, 1, 1024, sizeof(Exchange)}, stream, a.state, static_cast<const int32_t*>(a.equal), n);
  clear(op, a.pool, n, failed, stream);
  {
    EncodeInput same = in;  // the pivot came of the portable GEMM: so must what is compared with it
    same.hopper = false;
    gemm(same, GateRaggedArgs{nullptr, 0.0f, nullptr, a.state, a.pool, nullptr, 0}, {op, in.m, 0, failed, stream});
  }
  // Entries by row, those of a row by latent.
  launch(op, shape, sum_counts, {1, 1, 1024, sizeof(Exchange)}, stream, static_cast<const int32_t*>(a.pool.count), n, a.place);
  launch(op, shape, place_found, {lists, 1, 256}, stream, a.pool, static_cast<const int64_t*>(a.place));
  launch(op, shape, batch_tie, {1, 1, RANK_THREADS, sizeof(RankShared)}, stream, a.state, in, a.pool,
         static_cast<const int64_t*>(a.place));
  launch(op, shape, batch_count, {n, 1, 128, sizeof(Exchange)}, stream, static_cast<const BatchState*>(a.state), in, a.pool,
         static_cast<const int64_t*>(a.place), a.relu, a.equal);
  launch(op, shape, sum_counts, {1, 1, 1024, sizeof(Exchange)}, stream, static_cast<const int32_t*>(a.equal), n, a.offsets);
  visit(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(op, shape, batch_rows<T>, {n, 1, RANK_THREADS, sizeof(RankShared)}, stream, a.state, in, a.pool,
           static_cast<const int64_t*>(a.place), a.relu, static_cast<const int64_t*>(a.offsets), static_cast<T*>(a.values),
           a.indices);
  });
}

}  // namespace fusae::cuda
