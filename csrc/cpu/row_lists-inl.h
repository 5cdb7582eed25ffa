// SPDX-License-Identifier: Apache-2.0
// Ragged selections. What passes is kept in one list per row that grows as it has to, latents ascending: `encode_threshold`
// by a threshold of every latent, `encode_batch_topk` by one for the batch, the score of the last of the `keep` best so far.

inline void grow(RowList& list, int64_t wanted) {
  if (wanted <= list.cap) return;
  const int64_t cap = wanted > 2 * list.cap ? wanted + 16 : 2 * list.cap;
  float* pre = static_cast<float*>(std::malloc(static_cast<size_t>(cap) * (sizeof(float) + sizeof(int32_t))));
  if (!pre) throw std::bad_alloc();
  int32_t* idx = reinterpret_cast<int32_t*>(pre + cap);
  if (list.count) {
    std::memcpy(pre, list.pre, static_cast<size_t>(list.count) * sizeof(float));
    std::memcpy(idx, list.idx, static_cast<size_t>(list.count) * sizeof(int32_t));
  }
  std::free(list.pre);
  list.pre = pre;
  list.idx = idx;
  list.cap = cap;
}

// Hits of one block of latents for a group of rows; whole vectors are written, hence the N to spare.
struct Staging {
  static constexpr int64_t WIDTH = BLOCK + N;
  explicit Staging(int64_t rows) : pre(rows * WIDTH), idx(rows * WIDTH), count(rows) {
    std::memset(count.data, 0, static_cast<size_t>(rows) * sizeof(int32_t));
  }
  void put(int64_t slot, V v, uint32_t bits, int64_t first) {
    const int64_t at = slot * WIDTH + count.data[slot];
    append(pre.data + at, idx.data + at, v, static_cast<int32_t>(first), bits);
    count.data[slot] += __builtin_popcount(bits);
  }
  void flush(int64_t slot, RowList& list) {
    const int64_t n = count.data[slot];
    if (!n) return;
    grow(list, list.count + n);
    std::memcpy(list.pre + list.count, pre.data + slot * WIDTH, static_cast<size_t>(n) * sizeof(float));
    std::memcpy(list.idx + list.count, idx.data + slot * WIDTH, static_cast<size_t>(n) * sizeof(int32_t));
    list.count += n;
    count.data[slot] = 0;
  }
  Scratch<float> pre;
  Scratch<int32_t> idx, count;
};

// --- by a threshold of every latent ----------------------------------------------------------------------------------

template <bool WINDOW>
struct ThresholdSink {
  const ThresholdState& s;
  const float* limits;
  struct Local : Staging {
    Local(const ThresholdSink&, int64_t rows) : Staging(rows) {}
  };
  int64_t slab(int64_t) const { return SLAB; }
  void before(Local&, int64_t, int64_t) {}
  void take(Local& local, int64_t, int64_t slot, V pre, V score, uint32_t valid, int64_t first, V limit) {
    uint32_t bits = not_le(score, limit);
    if (WINDOW) bits |= less(magnitude_of(sub(pre, limit)), set1(s.half_window));
    bits &= valid;
    if (bits) local.put(slot, pre, bits, first);
  }
  void after(Local& local, int64_t row, int64_t slot) { local.flush(slot, s.lists[row]); }
  void slab_done() {}
};

void encode_threshold(const Products& a, const ThresholdState& s) {
  if (s.half_window > 0) {
    ThresholdSink<true> sink{s, s.threshold};
    stream_products(a, sink);
  } else {
    ThresholdSink<false> sink{s, s.threshold};
    stream_products(a, sink);
  }
}

void tile_threshold(const ProductTile& a, const ThresholdState& s) {
  if (s.half_window > 0) {
    ThresholdSink<true> sink{s, s.threshold};
    stream_tile(a, sink);
  } else {
    ThresholdSink<false> sink{s, s.threshold};
    stream_tile(a, sink);
  }
}

// --- the best of the batch -------------------------------------------------------------------------------------------

// The value that a score has to be above ("not less or equal") to be at least `score`: NaN admits everything.
inline float just_below(float score) {
  if (score != score) return __builtin_inff();
  if (score == -__builtin_inff()) return __builtin_nanf("");
  if (score == 0.0f) return -0x1p-149f;
  const uint32_t u = bits_of(score);
  return float_of(score > 0.0f ? u - 1 : u + 1);
}

template <class Stays>
inline void filter(RowList& list, const float* norms, Stays stays) {
  int64_t kept = 0;
  for (int64_t e = 0; e < list.count; ++e) {
    if (!stays(ordered(score_of(list.pre[e], list.idx[e], norms, false)))) continue;
    list.pre[kept] = list.pre[e];
    list.idx[kept++] = list.idx[e];
  }
  list.count = kept;
}

// Cuts the lists of all rows back to the `keep` best of the batch: larger score first, then the lower row, then the lower
// latent. Two histograms of 16 bits find the key of the last one: no order of arrival is a bad case.
void batch_cut(const BatchState& s, const float* norms, int32_t threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < s.rows; ++i) total += s.lists[i].count;
  if (total <= s.keep) return;
  constexpr int64_t BINS = 1 << 16;
  Scratch<int64_t> histogram(BINS), ties(s.rows);
  uint32_t last = 0;
  int64_t wanted = s.keep;  // of those whose high bits are those of `last`; in the end, of those that tie with it
  for (int pass = 0; pass < 2; ++pass) {
    std::memset(histogram.data, 0, BINS * sizeof(int64_t));
    for (int64_t i = 0; i < s.rows; ++i) {
      const RowList& list = s.lists[i];
      for (int64_t e = 0; e < list.count; ++e) {
        const uint32_t key = ordered(score_of(list.pre[e], list.idx[e], norms, false));
        if (pass == 0) {
          ++histogram.data[key >> 16];
        } else if ((key >> 16) == (last >> 16)) {
          ++histogram.data[key & (BINS - 1)];
        }
      }
    }
    int64_t bin = BINS - 1;
    while (histogram.data[bin] < wanted) wanted -= histogram.data[bin--];
    last |= static_cast<uint32_t>(bin) << (pass == 0 ? 16 : 0);
  }
  parallel_for(s.rows, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ties.data[i] = 0;
      filter(s.lists[i], norms, [&](uint32_t key) {
        ties.data[i] += key == last;
        return key >= last;
      });
    }
  });
  const float score = score_at(last), lower = just_below(score);
  for (int64_t i = 0; i < s.rows; ++i) {
    if (ties.data[i] > wanted) {
      int64_t left = wanted;
      filter(s.lists[i], norms, [&](uint32_t key) { return key != last || left-- > 0; });
    }
    wanted -= ties.data[i] < wanted ? ties.data[i] : wanted;
    // In the rows before that of the last one, a later latent with its score still beats it.
    s.threshold[i] = wanted > 0 ? lower : (score != score ? __builtin_inff() : score);
  }
}

struct BatchSink {
  const Products* a;  // null for a tile: the caller cuts
  const BatchState& s;
  const float* limits = nullptr;
  struct Local : Staging {
    Local(const BatchSink&, int64_t rows) : Staging(rows) {}
  };
  // The first latents admit nearly everything: few of them, then as many as were seen.
  int64_t slab(int64_t seen) const { return seen < BLOCK ? BLOCK : (seen < SLAB ? seen / BLOCK * BLOCK : SLAB); }
  void before(Local&, int64_t, int64_t) {}
  void take(Local& local, int64_t row, int64_t slot, V pre, V score, uint32_t valid, int64_t first, V) {
    const uint32_t bits = not_le(score, set1(s.threshold[s.first_row + row])) & valid;
    if (bits) local.put(slot, pre, bits, first);
  }
  void after(Local& local, int64_t row, int64_t slot) { local.flush(slot, s.lists[s.first_row + row]); }
  void slab_done() {
    int64_t total = 0;
    for (int64_t i = 0; i < s.rows; ++i) total += s.lists[i].count;
    if (total > 2 * s.keep + 4096) batch_cut(s, a->norms, a->threads);
  }
};

void encode_batch_topk(const Products& a, const BatchState& s) {
  BatchSink sink{&a, s};
  stream_products(a, sink);
}

void tile_batch_topk(const ProductTile& a, const BatchState& s) {
  BatchSink sink{nullptr, s};
  stream_tile(a, sink);
}

// --- lists become codes ----------------------------------------------------------------------------------------------

// A ReLU leaves no entry at or below 0.
inline bool left_out(const ListsArgs& a, float pre) { return a.relu && pre <= 0.0f; }

// offsets [n + 1]; returns the smallest positive score, +inf where there is none.
float lists_offsets(const ListsArgs& a) {
  a.offsets[0] = 0;
  float smallest = __builtin_inff();
  for (int64_t i = 0; i < a.n; ++i) {
    const RowList& list = a.lists[i];
    int64_t count = 0;
    for (int64_t e = 0; e < list.count; ++e) {
      if (left_out(a, list.pre[e])) continue;
      ++count;
      const float score = score_of(list.pre[e], list.idx[e], a.norms, false);
      if (score > 0.0f && score < smallest) smallest = score;
    }
    a.offsets[i + 1] = a.offsets[i] + count;
  }
  return smallest;
}

// Entries past `capacity` are left out; offsets tell, and l0 counts them all the same.
void lists_write(const ListsArgs& a) {
  parallel_for(a.n, 64, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowList& list = a.lists[i];
      int64_t at = a.offsets[i], active = 0;
      for (int64_t e = 0; e < list.count && (a.l0 || at < a.capacity); ++e) {
        const float pre = list.pre[e];
        if (left_out(a, pre)) continue;
        float value = pre;
        if (a.l0) {
          const float limit = a.threshold[list.idx[e]];
          const bool on = !(pre <= limit), near = __builtin_fabsf(pre - limit) < a.half_window;
          active += on;
          if (at < a.capacity) a.state[at] = static_cast<uint8_t>(on | near << 1);
          if (!on) value = 0.0f;
        }
        if (at >= a.capacity) continue;
        put(a.values, a.dtype, at, value);
        a.indices[at++] = list.idx[e];
      }
      if (a.l0) a.l0[i] = static_cast<float>(active);
    }
  });
}
