// SPDX-License-Identifier: Apache-2.0
// GEMM with a selection in its epilogue: a tile of products is compared with thresholds while it is still in registers, so
// that no pre-activation that fails is ever stored. What is compared, and what happens to the hits, is a Sink's business:
//
//   int64_t slab(int64_t seen)         how many latents come next, when `seen` are through; a multiple of BLOCK, <= SLAB
//   const float* limits                [m] values that come with every latent, or null
//   Sink::Local(sink, rows)            what one thread needs for a group of rows
//   void before(local, row, slot)      a row's next BLOCK of latents will follow; slot: the row's place in the group
//   void take(local, row, slot, pre, score, valid, first, limit)
//                                      N latents from `first` on; those that do not exist have no bit in `valid`
//   void after(local, row, slot)       the BLOCK is through
//   void slab_done()                   all rows have seen the slab; called by one thread
//
// The auxiliary top-k (AuxK) goes with any of them.
//
// Both operands are packed k-major in float: x in panels of MR rows, W in panels of NR latents. A slab of latents is
// packed by all threads, then every thread takes groups of rows through it. Latents reach a row in ascending order, and a
// product is always the same chain of sums over d, so nothing depends on threads or grouping.

#if defined(__AVX512F__)
constexpr int MR = 14;  // 14 x 2 vectors of sums, 2 of W, 1 of x: 31 of the 32 registers
#elif defined(__AVX2__)
constexpr int MR = 6;   // 12 + 2 + 1 of 16
#else
constexpr int MR = 2;
#endif
constexpr int64_t NR = 2 * N;
constexpr int64_t SLAB = 2048;  // latents packed together: a multiple of BLOCK
// A wider d is cut into equal parts of at most this, which are added up through memory: chains of sums stay short, so that
// the rounding error stays that of a blocked library GEMM, and a panel of W stays in the inner cache.
constexpr int64_t DEPTH = 192;
constexpr int64_t GROUP = 224 / MR;  // panels of rows that pass a panel of W one after the other

// Packs `count` rows of src (row r at src + r * stride, column j at + j * step) as dst[j * width + r], zero rows up to width.
template <class T>
inline void pack(float* dst, const T* src, int64_t stride, int64_t step, int64_t count, int64_t width, int64_t d) {
  int64_t j = 0;
  if (step == 1) {
    // Stores are whole vectors; the last must end inside the panel, as another thread may have packed the next one already.
    for (const int64_t reach = (width + N - 1) / N * N; (j + N - 1) * width + reach <= d * width; j += N) {
      for (int64_t first = 0; first < width; first += N) {
        V block[N];
        for (int64_t r = 0; r < N; ++r) block[r] = first + r < count ? load(src + (first + r) * stride + j) : zero();
        transpose(block);
        // Where width is no multiple of N, a store runs into the next columns, which are written after it.
        for (int64_t c = 0; c < N; ++c) store(dst + (j + c) * width + first, block[c]);
      }
    }
  }
  for (; j < d; ++j) {
    for (int64_t r = 0; r < width; ++r) dst[j * width + r] = r < count ? get(src + r * stride + j * step) : 0.0f;
  }
}

// Products of one panel of rows and one panel of latents over `depth` columns, left in registers.
inline void multiply(V (&c)[MR][2], const float* x, const float* w, int64_t depth) {
  for (int i = 0; i < MR; ++i) c[i][0] = c[i][1] = zero();
  for (int64_t j = 0; j < depth; ++j) {
    const V w0 = load(w), w1 = load(w + N);
    __builtin_prefetch(w + 8 * NR);
    __builtin_prefetch(w + 8 * NR + N);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
      const V xi = set1(x[i]);
      c[i][0] = fma(xi, w0, c[i][0]);
      c[i][1] = fma(xi, w1, c[i][1]);
    }
    x += MR;
    w += NR;
  }
}

// One panel of latents as the epilogue needs it.
struct Columns {
  int64_t first;
  uint32_t valid, masked;  // bits of the latents that exist, and of those that `aux` may select
  const float *bias, *norms, *limits;
};

inline void admit(const SelectState& s, int64_t row, V v, uint32_t bits, int64_t first) {
  if (!bits) return;
  const int64_t at = row * s.cap + s.count[row];
  append(s.pre + at, s.idx + at, v, static_cast<int32_t>(first), bits);
  s.count[row] += __builtin_popcount(bits);
}

template <class Sink>
inline void take_products(const V (&c)[MR][2], const Columns& p, const Products& a, Sink& sink,
                          typename Sink::Local& local, int64_t first_row, int64_t slot, int64_t rows) {
  for (int half = 0; half < 2; ++half) {
    const V bias = p.bias ? load(p.bias + half * N) : zero();
    const V norms = p.norms ? load(p.norms + half * N) : zero();
    const V limit = p.limits ? load(p.limits + half * N) : zero();
    const int64_t first = p.first + half * N;
    const uint32_t lanes = (uint32_t{1} << N) - 1, valid = (p.valid >> (half * N)) & lanes;
    const uint32_t masked = (p.masked >> (half * N)) & lanes;
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) {
      if (i >= rows) break;
      const int64_t row = first_row + i;
      const V v = p.bias ? add(c[i][half], bias) : c[i][half];
      V score = a.magnitude ? magnitude_of(v) : v;
      if (p.norms) score = mul(score, norms);
      sink.take(local, row, slot + i, v, score, valid, first, limit);
      if (masked) admit(a.aux, row, v, not_le(score, set1(a.aux.threshold[row])) & masked, first);
    }
  }
}

// What one thread does: panels [begin, end) of rows through the packed slab. `sums` holds the products of a group of rows
// with one block of latents while they are incomplete.
template <class Sink>
inline void stream_rows(const Products& a, Sink& sink, typename Sink::Local& local, const float* x, const float* w,
                        const Columns* columns, int64_t panels, int64_t begin, int64_t end, uint64_t* keys,
                        float* sums) {
  constexpr int64_t PER_BLOCK = BLOCK / NR;
  const int64_t parts = (a.d + DEPTH - 1) / DEPTH;
  const int64_t first_row = begin * MR, last_row = end * MR < a.n ? end * MR : a.n;
  for (int64_t b = 0; b < panels; b += PER_BLOCK) {
    const int64_t last = b + PER_BLOCK < panels ? b + PER_BLOCK : panels;
    for (int64_t row = first_row; row < last_row; ++row) {
      sink.before(local, row, row - first_row);
      if (a.aux.k && a.aux.count[row] + BLOCK + N > a.aux.cap) cut(a.aux, row, a.norms, a.magnitude, keys);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = a.d * part / parts, depth = a.d * (part + 1) / parts - from;
      float* sum = sums;
      for (int64_t p = b; p < last; ++p) {
        for (int64_t i = begin; i < end; ++i, sum += MR * NR) {
          V c[MR][2];
          multiply(c, x + (i * a.d + from) * MR, w + (p * a.d + from) * NR, depth);
          if (part > 0) {
            for (int r = 0; r < 2 * MR; ++r) c[r / 2][r % 2] = add(load(sum + r * N), c[r / 2][r % 2]);
          }
          if (part + 1 < parts) {
            for (int r = 0; r < 2 * MR; ++r) store(sum + r * N, c[r / 2][r % 2]);
          } else {
            take_products(c, columns[p], a, sink, local, i * MR, i * MR - first_row, last_row - i * MR);
          }
        }
      }
    }
    for (int64_t row = first_row; row < last_row; ++row) sink.after(local, row, row - first_row);
  }
}

template <class Sink>
inline void stream_products(const Products& a, Sink& sink) {
  const int64_t row_panels = (a.n + MR - 1) / MR, slab = a.m < SLAB ? a.m : SLAB;
  Scratch<float> x(row_panels * MR * a.d), w((slab + NR) * a.d + 16 * NR), padded(3 * (SLAB + NR));
  Scratch<Columns> columns(SLAB / NR + 1);
  // Enough groups to even out the threads, enough rows in each to use a panel of W several times from the inner cache.
  int64_t group = row_panels / (6 * static_cast<int64_t>(a.threads));
  group = group < 1 ? 1 : (group > GROUP ? GROUP : group);
  visit(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *rows = static_cast<const T*>(a.x), *weight = static_cast<const T*>(a.weight);
    parallel_for(row_panels, 1, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t count = a.n - i * MR < MR ? a.n - i * MR : MR;
        pack(x.data + i * MR * a.d, rows + i * MR * a.x_stride, a.x_stride, a.x_step, count, MR, a.d);
      }
    });
    for (int64_t first = 0, latents; first < a.m; first += latents) {
      latents = sink.slab(first);
      if (a.m - first < latents) latents = a.m - first;
      const int64_t panels = (latents + NR - 1) / NR;
      parallel_for(panels, 1, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t latent = first + p * NR, count = first + latents - latent < NR ? first + latents - latent : NR;
          pack(w.data + p * NR * a.d, weight + latent * a.w_stride, a.w_stride, a.w_step, count, NR, a.d);
          Columns c{latent, 0, 0, nullptr, nullptr, nullptr};
          for (int64_t j = 0; j < count; ++j) {
            c.valid |= uint32_t{1} << j;
            if (a.aux.k && a.mask[latent + j]) c.masked |= uint32_t{1} << j;
          }
          const float* sources[3] = {a.bias, a.norms, sink.limits};
          const float** places[3] = {&c.bias, &c.norms, &c.limits};
          for (int s = 0; s < 3; ++s) {
            if (!sources[s]) continue;
            float* pad = padded.data + s * (SLAB + NR) + p * NR;
            for (int64_t j = 0; j < NR; ++j) pad[j] = j < count ? sources[s][latent + j] : 0.0f;
            *places[s] = pad;
          }
          columns.data[p] = c;
        }
      });
      parallel_for(row_panels, group, a.threads, [&](int64_t begin, int64_t end) {
        Scratch<uint64_t> keys(2 * a.aux.cap);
        Scratch<float> sums(BLOCK * group * MR);
        typename Sink::Local local(sink, group * MR);
        // With one thread everything comes in one call: keep to groups, for the cache.
        for (int64_t g = begin; g < end; g += group) {
          stream_rows(a, sink, local, x.data, w.data, columns.data, panels, g, g + group < end ? g + group : end,
                      keys.data, sums.data);
        }
      });
      sink.slab_done();
    }
  });
}

// The same for products that lie in memory: a tile of columns in float.
template <class Sink>
inline void stream_tile(const ProductTile& a, Sink& sink) {
  parallel_for(a.n, 16, a.threads, [&](int64_t begin, int64_t end) {
    Scratch<uint64_t> keys(2 * a.aux.cap);
    typename Sink::Local local(sink, 1);
    for (int64_t row = begin; row < end; ++row) {
      const float* tile = static_cast<const float*>(a.tile) + row * a.stride;
      for (int64_t c = 0; c < a.cols; c += N) {
        if (c % BLOCK == 0) {
          if (c > 0) sink.after(local, row, 0);
          sink.before(local, row, 0);
          if (a.aux.k && a.aux.count[row] + BLOCK + N > a.aux.cap) cut(a.aux, row, a.norms, a.magnitude, keys.data);
        }
        const int64_t count = a.cols - c < N ? a.cols - c : N;
        const float* sources[4] = {tile + c, a.bias ? a.bias + c : nullptr, a.norms ? a.norms + a.first + c : nullptr,
                                   sink.limits ? sink.limits + a.first + c : nullptr};
        V parts[4];
        for (int s = 0; s < 4; ++s) {
          if (count == N || !sources[s]) {
            parts[s] = sources[s] ? load(sources[s]) : zero();
          } else {
            float padded[N] = {};
            std::memcpy(padded, sources[s], static_cast<size_t>(count) * sizeof(float));
            parts[s] = load(padded);
          }
        }
        uint32_t valid = (uint32_t{1} << count) - 1, masked = 0;
        for (int64_t j = 0; a.aux.k && j < count; ++j) masked |= static_cast<uint32_t>(a.mask[c + j] != 0) << j;
        const V v = a.bias ? add(parts[0], parts[1]) : parts[0];
        V score = a.magnitude ? magnitude_of(v) : v;
        if (a.norms) score = mul(score, parts[2]);
        sink.take(local, row, 0, v, score, valid, a.first + c, parts[3]);
        if (masked) admit(a.aux, row, v, not_le(score, set1(a.aux.threshold[row])) & masked, a.first + c);
      }
      sink.after(local, row, 0);
    }
  });
}
