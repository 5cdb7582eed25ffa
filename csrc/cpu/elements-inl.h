// SPDX-License-Identifier: Apache-2.0
// Loads and stores of storage types as float vectors and scalars, and scratch memory.

inline V load(const bf16* p) { return load_bf16(&p->bits); }
inline V load(const f16* p) { return load_f16(&p->bits); }
inline void store(bf16* p, V a) { store_bf16(&p->bits, a); }
inline void store(f16* p, V a) { store_f16(&p->bits, a); }
inline float get(const float* p) { return *p; }
inline float get(const bf16* p) { return bf16_to_float(p->bits); }
inline float get(const f16* p) { return f16_to_float(p->bits); }
inline void put(float* p, float a) { *p = a; }
inline void put(bf16* p, float a) { p->bits = float_to_bf16(a); }
inline void put(f16* p, float a) { p->bits = float_to_f16(a); }
// A read of storage whose type is only known at run time: for sparse values, a few per row.
inline float get(const void* p, DType t, int64_t i) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return t == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}
inline void put(void* p, DType t, int64_t i, float a) {
  if (t == DType::f32) {
    static_cast<float*>(p)[i] = a;
  } else {
    static_cast<uint16_t*>(p)[i] = t == DType::bf16 ? float_to_bf16(a) : float_to_f16(a);
  }
}

template <class T>
inline float dot_rows(const T* a, const T* b, int64_t d) {
  V s = zero();
  int64_t j = 0;
  for (; j + N <= d; j += N) s = fma(load(a + j), load(b + j), s);
  float tail = 0.0f;
  for (; j < d; ++j) tail = __builtin_fmaf(get(a + j), get(b + j), tail);
  return sum(s) + tail;
}

// Memory of a kernel or of one thread's share of it, aligned to cache lines: a vector that straddles two costs two reads.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n > 0 ? n : 1) * sizeof(T) + 63) & ~size_t{63};
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};
