// SPDX-License-Identifier: Apache-2.0
// The only file that knows the thread runtime. Work is handed out dynamically; every item is computed by one thread from
// start to end, so results never depend on the number of threads.
#pragma once
#include <cstdint>
#include <new>

namespace fusae::cpu {
namespace {

template <class F>  // f(begin, end)
inline void parallel_for(int64_t n, int64_t grain, int32_t threads, F f) {
  if (n <= 0) return;
  const int64_t blocks = (n + grain - 1) / grain;
  if (threads <= 1 || blocks == 1) {
    f(int64_t{0}, n);
    return;
  }
  bool failed = false;  // an exception must not leave a parallel region; the only one there is, is for memory
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(|| : failed)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * grain;
    try {
      f(begin, begin + grain < n ? begin + grain : n);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace
}  // namespace fusae::cpu
