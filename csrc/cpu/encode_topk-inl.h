// SPDX-License-Identifier: Apache-2.0
// What `encode_topk` does with the products: the k best of every row, or the best of every group of latents.

struct TopkSink {
  const Products& a;
  const SelectState& s;
  const float* limits = nullptr;
  struct Local {
    Local(const TopkSink& sink, int64_t) : keys(2 * sink.s.cap) {}
    Scratch<uint64_t> keys;
  };
  int64_t slab(int64_t) const { return SLAB; }
  void before(Local& local, int64_t row, int64_t) {
    if (s.count[row] + BLOCK + N > s.cap) cut(s, row, a.norms, a.magnitude, local.keys.data);
  }
  void take(Local&, int64_t row, int64_t, V pre, V score, uint32_t valid, int64_t first, V) {
    admit(s, row, pre, not_le(score, set1(s.threshold[row])) & valid, first);
  }
  void after(Local&, int64_t, int64_t) {}
  void slab_done() {}
};

void encode_topk(const Products& a, const SelectState& main) {
  TopkSink sink{a, main};
  stream_products(a, sink);
}

// The best latent of every group so far. idx < 0: none yet.
struct GroupSink {
  const GroupState& s;
  const float* norms;
  const float* limits = nullptr;
  struct Local {
    Local(const GroupSink&, int64_t) {}
  };
  int64_t slab(int64_t) const { return SLAB; }
  void before(Local&, int64_t, int64_t) {}
  void after(Local&, int64_t, int64_t) {}
  void slab_done() {}
  void take(Local&, int64_t row, int64_t, V pre, V score, uint32_t valid, int64_t first, V) {
    if (!valid) return;  // `first` may lie past the last group
    const int64_t group = first / s.size, at = row * s.k + group;
    if ((first + N - 1) / s.size == group && s.idx[at] >= 0) {  // NaN in hand: nothing passes but NaN, which loses below
      const float best = score_of(s.pre[at], s.idx[at], norms, false);
      valid &= not_le(score, set1(best != best ? __builtin_inff() : best));
    }
    if (!valid) return;
    float values[N];
    store(values, pre);
    for (; valid; valid &= valid - 1) {
      const int lane = __builtin_ctz(valid);
      const int32_t latent = static_cast<int32_t>(first + lane);
      const int64_t place = row * s.k + latent / s.size;
      if (s.idx[place] >= 0 && key_of(score_of(values[lane], latent, norms, false), latent) <
                                   key_of(score_of(s.pre[place], s.idx[place], norms, false), s.idx[place]))
        continue;
      s.pre[place] = values[lane];
      s.idx[place] = latent;
    }
  }
};

void encode_group_max(const Products& a, const GroupState& s) {
  GroupSink sink{s, a.norms};
  stream_products(a, sink);
}

void tile_group_max(const ProductTile& a, const GroupState& s) {
  GroupSink sink{s, a.norms};
  stream_tile(a, sink);
}
