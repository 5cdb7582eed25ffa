// SPDX-License-Identifier: Apache-2.0
// The processor's own limit, for benchmarks: multiply-adds on registers alone, on every thread.

double fma_burst(int64_t iterations, int32_t threads) {
  constexpr int CHAINS = 12;  // enough to cover the latency of a multiply-add, and in registers on every set
  Scratch<float> sink(threads * N);
  parallel_for(threads, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      V c[CHAINS];
      const V a = set1(0.999f), b = set1(1e-3f);
      for (int i = 0; i < CHAINS; ++i) c[i] = set1(static_cast<float>(i));
      for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) c[i] = fma(c[i], a, b);
      }
      for (int i = 1; i < CHAINS; ++i) c[0] = add(c[0], c[i]);
      store(sink.data + t * N, c[0]);
    }
  });
  return 2.0 * CHAINS * N * static_cast<double>(iterations) * threads;
}
