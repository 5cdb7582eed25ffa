// SPDX-License-Identifier: Apache-2.0
// Moments in few bits, and the counter-based random bits that round them. The formulas are those of
// python/fusae/reference/moments.py; the loops are plain ones over memory of a row, which compilers turn into vectors.

constexpr int64_t MOMENT_BLOCK = 256;  // elements of a row that share an exponent

inline uint64_t mix64(uint64_t a) {
  a = (a ^ (a >> 30)) * 0xBF58476D1CE4E5B9u;
  a = (a ^ (a >> 27)) * 0x94D049BB133111EBu;
  return a ^ (a >> 31);
}

// 16 + 16 random bits for every column.
inline void random_bits(uint32_t* out, uint32_t key, int64_t d) {
  for (int64_t j = 0; j < d; ++j) {
    uint32_t a = key + static_cast<uint32_t>(j) * 0x9E3779B9u;
    a = (a ^ (a >> 16)) * 0x7FEB352Du;
    a = (a ^ (a >> 15)) * 0x846CA68Bu;
    out[j] = a ^ (a >> 16);
  }
}

// Rounded up or down with the probability that keeps the mean; which half of `bits` serves is SHIFT's business.
template <int SHIFT>
inline void write_bf16(bf16* __restrict to, const float* __restrict from, const uint32_t* __restrict bits, int64_t d) {
  for (int64_t j = 0; j < d; ++j) {
    const uint32_t raw = bits_of(from[j]), rest = raw & 0x7fffffff;
    const uint32_t rounded = raw + ((bits[j] >> SHIFT) & 0xffff);
    // An infinity stays; a NaN keeps its upper bits, made quiet.
    const uint32_t special = rest > 0x7f800000 ? raw | 0x400000 : raw;
    to[j].bits = static_cast<uint16_t>((rest < 0x7f800000 ? rounded : special) >> 16);
  }
}

// 8-bit codes: 3 bits of mantissa over OCTAVES exponents below that of the block, evenly spaced below those.
template <bool SIGNED>
struct Code {
  static constexpr uint32_t OCTAVES = SIGNED ? 15 : 31, HIGHEST = SIGNED ? 127 : 255;
  static constexpr uint32_t OFFSET = (127 - OCTAVES) << 23;  // exponent 0 of a code, in a float of the unit block
  static constexpr float STEP = SIGNED ? 0x1p-17f : 0x1p-33f;  // between codes below 8
};

template <bool SIGNED>
inline void read_codes(float* __restrict to, const uint8_t* __restrict row, int64_t d) {
  using C = Code<SIGNED>;
  for (int64_t first = 0, b = 0; first < d; first += MOMENT_BLOCK, ++b) {
    const float scale = float_of(static_cast<uint32_t>(row[d + b]) << 23);
    const int64_t last = first + MOMENT_BLOCK < d ? first + MOMENT_BLOCK : d;
    for (int64_t j = first; j < last; ++j) {
      const uint32_t code = row[j], magnitude = SIGNED ? code & 0x7f : code;
      const float fine = static_cast<float>(static_cast<int32_t>(magnitude)) * C::STEP;
      const float value = (magnitude < 8 ? fine : float_of((magnitude << 20) + C::OFFSET)) * scale;
      to[j] = SIGNED && code > 127 ? -value : value;
    }
  }
}

template <bool SIGNED>
inline void write_codes(uint8_t* __restrict row, const float* __restrict from, const uint32_t* __restrict bits,
                        int64_t d) {
  using C = Code<SIGNED>;
  for (int64_t first = 0, b = 0; first < d; first += MOMENT_BLOCK, ++b) {
    const int64_t last = first + MOMENT_BLOCK < d ? first + MOMENT_BLOCK : d;
    uint32_t top = 0;
    for (int64_t j = first; j < last; ++j) {
      const uint32_t rest = bits_of(from[j]) & 0x7fffffff;
      top = rest > top ? rest : top;
    }
    // One more where the largest would be rounded beyond the highest code.
    uint32_t exponent = (top + 0xfffff) >> 23;
    exponent = exponent > 253 ? 253 : exponent;
    if (top >= 0x7f800000) exponent = 255;  // marks a block that is not finite: it is read as NaN
    row[d + b] = static_cast<uint8_t>(exponent);
    if (exponent == 0 || exponent == 255) {
      std::memset(row + first, 0, static_cast<size_t>(last - first));
      continue;
    }
    const float scale = float_of((254 - exponent) << 23);
    for (int64_t j = first; j < last; ++j) {
      const uint32_t raw = bits_of(from[j]), lot = SIGNED ? bits[j] & 0xffff : bits[j] >> 16;
      const float unit = float_of(raw & 0x7fffffff) * scale;
      const float fine = unit * (1.0f / C::STEP) + (static_cast<float>(static_cast<int32_t>(lot)) + 0.5f) * 0x1p-16f;
      const uint32_t even = static_cast<uint32_t>(static_cast<int32_t>(fine < 16.0f ? fine : 16.0f));
      const uint32_t coarse = ((bits_of(unit) + (lot << 4) + 8) >> 20) - (C::OFFSET >> 20);
      uint32_t code = unit < C::STEP * 8.0f ? even : coarse;
      code = code > C::HIGHEST ? C::HIGHEST : code;
      if (SIGNED) {
        code |= code ? (raw >> 24) & 0x80 : 0;
      } else {  // a denominator of 0 would be the largest step of all
        code = code == 0 && unit > 0.0f ? 1 : code;
      }
      row[j] = static_cast<uint8_t>(code);
    }
  }
}

// A row of moments in float: in place where it is stored so, else in `scratch`.
template <bool SIGNED>
inline float* open_moments(void* stored, Moments type, int64_t row, int64_t d, float* scratch) {
  if (type == Moments::f32) return static_cast<float*>(stored) + row * d;
  if (type == Moments::codes) {
    const int64_t width = d + (d + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
    read_codes<SIGNED>(scratch, static_cast<const uint8_t*>(stored) + row * width, d);
  } else {
    const bf16* from = static_cast<const bf16*>(stored) + row * d;
    for (int64_t j = 0; j < d; ++j) scratch[j] = bf16_to_float(from[j].bits);
  }
  return scratch;
}

template <bool SIGNED>
inline void close_moments(void* stored, Moments type, int64_t row, int64_t d, const float* scratch,
                          const uint32_t* bits) {
  if (type == Moments::codes) {
    const int64_t width = d + (d + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
    write_codes<SIGNED>(static_cast<uint8_t*>(stored) + row * width, scratch, bits, d);
  } else if (type == Moments::bf16) {
    write_bf16<SIGNED ? 0 : 16>(static_cast<bf16*>(stored) + row * d, scratch, bits, d);
  }
}
