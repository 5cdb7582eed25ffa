// SPDX-License-Identifier: Apache-2.0
// Exact streaming top-k. Column tiles arrive in ascending order; a row admits what beats its threshold (the k-th best
// score when the row was last cut), keeps candidates in order of arrival, and is cut back to k when the next block might
// not fit. A candidate that ties with the threshold has a higher index than k others and loses: the test is strict.
// NaN is the largest score, so the test is "not less or equal". The threshold starts as NaN, which admits everything.

constexpr int64_t BLOCK = 256;  // columns between two checks of a row's capacity

// Order-preserving bits of a score: NaN highest, -0 as +0; and back.
inline uint32_t ordered(float score) {
  const uint32_t u = bits_of(score + 0.0f);
  return score != score ? 0xffffffffu : ((u & 0x80000000u) ? ~u : (u | 0x80000000u));
}
inline float score_at(uint32_t key) {
  if (key == 0xffffffffu) return __builtin_nanf("");
  return float_of((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

// Unique key: the score, then the lower index first.
inline uint64_t key_of(float score, int32_t index) {
  return (static_cast<uint64_t>(ordered(score)) << 32) | static_cast<uint32_t>(~index);
}

inline float score_of(float pre, int32_t index, const float* norms, bool magnitude) {
  const float s = magnitude ? __builtin_fabsf(pre) : pre;
  return norms ? s * norms[index] : s;
}

// The k-th largest of n distinct keys (1 <= k <= n); reorders them. Pivots are pseudo-random, so no order of arrival is
// a bad case.
inline uint64_t kth_largest(uint64_t* a, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  const int64_t want = k - 1;
  uint64_t random = 0x9e3779b97f4a7c15u;
  while (low < high) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const int64_t width = high - low + 1;
    const uint64_t p0 = a[low + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(width))];
    const uint64_t p1 = a[low + width / 2], p2 = a[high];
    const uint64_t lo = p0 < p1 ? p0 : p1, hi = p0 < p1 ? p1 : p0;
    const uint64_t pivot = p2 < lo ? lo : (p2 > hi ? hi : p2);
    int64_t i = low, j = high;
    while (i <= j) {
      while (a[i] > pivot) ++i;
      while (a[j] < pivot) --j;
      if (i <= j) {
        const uint64_t t = a[i];
        a[i++] = a[j];
        a[j--] = t;
      }
    }
    if (want <= j) {
      high = j;
    } else if (want >= i) {
      low = i;
    } else {
      return a[want];
    }
  }
  return a[want];
}

// Keeps the k best candidates of a row, in order of arrival, and sets its threshold. `keys` has room for 2 * cap.
inline void cut(const SelectState& s, int64_t row, const float* norms, bool magnitude, uint64_t* keys) {
  float* pre = s.pre + row * s.cap;
  int32_t* idx = s.idx + row * s.cap;
  const int64_t n = s.count[row];
  uint64_t* order = keys + s.cap;
  for (int64_t i = 0; i < n; ++i) keys[i] = order[i] = key_of(score_of(pre[i], idx[i], norms, magnitude), idx[i]);
  const uint64_t last = kth_largest(order, n, s.k);
  int64_t kept = 0;
  float threshold = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] < last) continue;
    if (keys[i] == last) threshold = score_of(pre[i], idx[i], norms, magnitude);
    pre[kept] = pre[i];
    idx[kept++] = idx[i];
  }
  s.count[row] = static_cast<int32_t>(kept);
  // With k NaN in hand nothing can enter; +inf still admits NaN, which loses at the next cut.
  s.threshold[row] = threshold != threshold ? __builtin_inff() : threshold;
}

template <class T>
inline void select_block(const SelectState& s, int64_t row, const T* tile, int64_t first, int64_t cols,
                         const float* bias, const float* norms, const uint8_t* mask, bool magnitude) {
  float* pre = s.pre + row * s.cap;
  int32_t* idx = s.idx + row * s.cap;
  int64_t count = s.count[row];
  const float threshold = s.threshold[row];
  const V limit = set1(threshold);
  int64_t c = 0;
  for (; c + N <= cols; c += N) {
    V v = load(tile + c);
    if (bias) v = add(v, load(bias + c));
    V score = magnitude ? magnitude_of(v) : v;
    if (norms) score = mul(score, load(norms + c));
    uint32_t bits = not_le(score, limit);
    if (mask && bits) bits &= nonzero_bytes(mask + c);
    if (bits) {
      append(pre + count, idx + count, v, static_cast<int32_t>(first + c), bits);
      count += __builtin_popcount(bits);
    }
  }
  for (; c < cols; ++c) {
    float v = get(tile + c);
    if (bias) v += bias[c];
    float score = magnitude ? __builtin_fabsf(v) : v;
    if (norms) score *= norms[c];
    if (!(score <= threshold) && (!mask || mask[c])) {
      pre[count] = v;
      idx[count++] = static_cast<int32_t>(first + c);
    }
  }
  s.count[row] = static_cast<int32_t>(count);
}

template <class T>
inline void select_row(const ProductTile& a, const SelectState& s, int64_t row, const uint8_t* mask, uint64_t* keys) {
  const T* tile = static_cast<const T*>(a.tile) + row * a.stride;
  for (int64_t c = 0; c < a.cols; c += BLOCK) {
    const int64_t width = a.cols - c < BLOCK ? a.cols - c : BLOCK;
    // append() writes whole vectors, hence the N to spare.
    if (s.count[row] + width + N > s.cap) cut(s, row, a.norms, a.magnitude, keys);
    select_block(s, row, tile + c, a.first + c, width, a.bias ? a.bias + c : nullptr, a.norms ? a.norms + a.first + c : nullptr,
                 mask ? mask + c : nullptr, a.magnitude);
  }
}

void tile_topk(const ProductTile& a, const SelectState& main) {
  bool any_masked = false;
  for (int64_t c = 0; a.aux.k && c < a.cols && !any_masked; ++c) any_masked = a.mask[c] != 0;
  const int64_t cap = a.aux.k && a.aux.cap > main.cap ? a.aux.cap : main.cap;
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(a.n, 16, a.threads, [&](int64_t begin, int64_t end) {
      Scratch<uint64_t> keys(2 * cap);
      for (int64_t row = begin; row < end; ++row) {
        select_row<T>(a, main, row, nullptr, keys.data);
        if (any_masked) select_row<T>(a, a.aux, row, a.mask, keys.data);
      }
    });
  });
}

// Sorts distinct keys, largest first. `spare` has room for n.
inline void sort_descending(uint64_t* a, uint64_t* spare, int64_t n) {
  constexpr int64_t RUN = 16;
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = begin + RUN < n ? begin + RUN : n;
    for (int64_t i = begin + 1; i < end; ++i) {
      const uint64_t x = a[i];
      int64_t j = i;
      for (; j > begin && a[j - 1] < x; --j) a[j] = a[j - 1];
      a[j] = x;
    }
  }
  uint64_t *from = a, *to = spare;
  for (int64_t width = RUN; width < n; width *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * width) {
      const int64_t mid = begin + width < n ? begin + width : n, end = mid + width < n ? mid + width : n;
      int64_t i = begin, j = mid;
      for (int64_t o = begin; o < end; ++o) to[o] = (j >= end || (i < mid && from[i] > from[j])) ? from[i++] : from[j++];
    }
    uint64_t* t = from;
    from = to;
    to = t;
  }
  if (from != a) std::memcpy(a, from, static_cast<size_t>(n) * sizeof(uint64_t));
}

void select_finish(const SelectFinishArgs& a) {
  const SelectState& s = a.state;
  parallel_for(a.n, 16, a.threads, [&](int64_t begin, int64_t end) {
    Scratch<uint64_t> keys(2 * s.cap);
    for (int64_t row = begin; row < end; ++row) {
      if (s.count[row] > s.k) cut(s, row, a.norms, a.magnitude, keys.data);
      const float* pre = s.pre + row * s.cap;
      const int32_t* idx = s.idx + row * s.cap;
      const int64_t n = s.count[row];
      for (int64_t i = 0; i < n; ++i) keys.data[i] = key_of(score_of(pre[i], idx[i], a.norms, a.magnitude), idx[i]);
      sort_descending(keys.data, keys.data + s.cap, n);
      int32_t* indices = a.indices + row * s.k;
      for (int64_t i = 0; i < n; ++i) indices[i] = static_cast<int32_t>(~static_cast<uint32_t>(keys.data[i]));
      // Candidates ascend by latent: a binary search takes each sorted latent back to its pre-activation.
      for (int64_t i = 0; i < n; ++i) {
        int64_t low = 0, high = n - 1;
        while (low < high) {
          const int64_t mid = (low + high) / 2;
          if (idx[mid] < indices[i]) low = mid + 1; else high = mid;
        }
        const float v = pre[low];
        put(a.values, a.dtype, row * s.k + i, a.relu && v <= 0.0f ? 0.0f : v);
      }
      // Fewer masked latents than k: unmasked ones fill up, lowest first.
      int64_t filled = n;
      for (int64_t j = 0; a.mask && filled < s.k; ++j) {
        if (a.mask[j]) continue;
        indices[filled] = static_cast<int32_t>(j);
        put(a.values, a.dtype, row * s.k + filled++, 0.0f);
      }
    }
  });
}
