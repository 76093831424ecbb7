// Numbers of 16 bits next to fp32: what a cache stores its keys and values in.
//
// Reading is exact; writing rounds to the nearest as torch does, ties to even.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector.h"

namespace spanwise {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float widen(Float16 value) { return _cvtsh_ss(value.bits); }

// Loads sixteen numbers.
inline Floats load_wide(const float* from) { return load(from); }

inline Floats load_wide(const BFloat16* from) {
  typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2)));
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return floats_of(__builtin_convertvector(bits, Ints) << 16);
}

inline Floats load_wide(const Float16* from) {
  Floats out;
  for (long half = 0; half < 2; ++half) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * half)));
    std::memcpy(reinterpret_cast<float*>(&out) + 8 * half, &wide, sizeof wide);
  }
  return out;
}

// Loads the first `count` of sixteen; the others are 0.
template <class Element>
Floats load_wide_some(const Element* from, long count) {
  Element some[LANES] = {};
  std::memcpy(some, from, static_cast<unsigned long>(count) * sizeof(Element));
  return load_wide(some);
}

inline void narrow(float* to, float value) { *to = value; }

inline void narrow(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline void narrow(Float16* to, float value) { to->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace spanwise
