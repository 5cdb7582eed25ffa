// SPDX-License-Identifier: Apache-2.0
// A thin vector of floats for the instruction set being compiled. Included inside that set's namespace by
// kernels-inl.h: no include, no std template here, so that no vector code leaks into another translation unit.

#if defined(__AVX512F__)

constexpr int64_t N = 16;
using V = __m512;
inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float a) { return _mm512_set1_ps(a); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V root(V a) { return _mm512_sqrt_ps(a); }
inline V magnitude_of(V a) { return _mm512_abs_ps(a); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
// Bits of the lanes where a > b or either is NaN.
inline uint32_t not_le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
// Bits of the lanes where a < b.
inline uint32_t less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// Bits of the lanes whose byte is not zero.
inline uint32_t nonzero_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
}
// Writes the lanes of `a` whose bit is set, and their positions first + lane, one after the other.
inline void append(float* values, int32_t* index, V a, int32_t first, uint32_t bits) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  // Compress in registers and store whole: the compressing store is microcoded on some processors. Needs N slots.
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), a));
  _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), place));
}
// Rows become columns.
inline void transpose(V (&r)[N]) {
  V t[N];
  for (int g = 0; g < 16; g += 4) {  // columns of 4 x 4 blocks, one block in each quarter of a vector
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[g], r[g + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[g], r[g + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[g + 2], r[g + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[g + 2], r[g + 3]));
    t[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; ++c) {  // then a transpose of the quarters
    const V even0 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0x88), even1 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0x88);
    const V odd0 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0xdd), odd1 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0xdd);
    r[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[c + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[c + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    r[c + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}
inline V load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_bf16(uint16_t* p, V a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i out = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
inline void store_f16(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

constexpr int64_t N = 8;
using V = __m256;
inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float a) { return _mm256_set1_ps(a); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V root(V a) { return _mm256_sqrt_ps(a); }
inline V magnitude_of(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline uint32_t not_le(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ))); }
inline uint32_t less(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ))); }
inline uint32_t nonzero_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()))) & 0xff;
}
inline void append(float* values, int32_t* index, V a, int32_t first, uint32_t bits) {
  alignas(32) float lane[N];
  _mm256_store_ps(lane, a);
  for (; bits; bits &= bits - 1) {
    const int i = __builtin_ctz(bits);
    *values++ = lane[i];
    *index++ = first + i;
  }
}
inline void transpose(V (&r)[N]) {
  V t[N];
  for (int g = 0; g < 8; g += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[g], r[g + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r[g], r[g + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[g + 2], r[g + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r[g + 2], r[g + 3]));
    t[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    t[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    t[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    t[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(t[c], t[c + 4], 0x20);
    r[c + 4] = _mm256_permute2f128_ps(t[c], t[c + 4], 0x31);
  }
}
inline V load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bf16(uint16_t* p, V a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i low = _mm256_castsi256_si128(out), high = _mm256_extracti128_si256(out, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
inline void store_f16(uint16_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#else  // portable: fixed-length loops that a compiler can vectorise for its baseline

constexpr int64_t N = 8;
struct V {
  float v[N];
};
#define FUSAE_LANES for (int64_t i = 0; i < N; ++i)
inline V set1(float a) { V r; FUSAE_LANES r.v[i] = a; return r; }
inline V zero() { return set1(0.0f); }
inline V load(const float* p) { V r; FUSAE_LANES r.v[i] = p[i]; return r; }
inline void store(float* p, V a) { FUSAE_LANES p[i] = a.v[i]; }
inline V add(V a, V b) { FUSAE_LANES a.v[i] += b.v[i]; return a; }
inline V sub(V a, V b) { FUSAE_LANES a.v[i] -= b.v[i]; return a; }
inline V mul(V a, V b) { FUSAE_LANES a.v[i] *= b.v[i]; return a; }
inline V div(V a, V b) { FUSAE_LANES a.v[i] /= b.v[i]; return a; }
inline V fma(V a, V b, V c) { FUSAE_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
inline V root(V a) { FUSAE_LANES a.v[i] = __builtin_sqrtf(a.v[i]); return a; }
inline V magnitude_of(V a) { FUSAE_LANES a.v[i] = __builtin_fabsf(a.v[i]); return a; }
inline float sum(V a) {
  const float* v = a.v;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
inline uint32_t not_le(V a, V b) {
  uint32_t bits = 0;
  FUSAE_LANES bits |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
  return bits;
}
inline uint32_t less(V a, V b) {
  uint32_t bits = 0;
  FUSAE_LANES bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
inline uint32_t nonzero_bytes(const uint8_t* p) {
  uint32_t bits = 0;
  FUSAE_LANES bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return bits;
}
inline void append(float* values, int32_t* index, V a, int32_t first, uint32_t bits) {
  for (; bits; bits &= bits - 1) {
    const int i = __builtin_ctz(bits);
    *values++ = a.v[i];
    *index++ = first + i;
  }
}
inline void transpose(V (&r)[N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
  }
}
inline V load_bf16(const uint16_t* p) { V r; FUSAE_LANES r.v[i] = bf16_to_float(p[i]); return r; }
inline V load_f16(const uint16_t* p) { V r; FUSAE_LANES r.v[i] = f16_to_float(p[i]); return r; }
inline void store_bf16(uint16_t* p, V a) { FUSAE_LANES p[i] = float_to_bf16(a.v[i]); }
inline void store_f16(uint16_t* p, V a) { FUSAE_LANES p[i] = float_to_f16(a.v[i]); }
#undef FUSAE_LANES

#endif
