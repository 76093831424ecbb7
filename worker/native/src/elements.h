// Numbers of 16 bits next to fp32: what a cache stores its keys and values in.
//
// Reading is exact; writing rounds to the nearest as torch does, ties to even.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector.h"

namespace spanwise {

constexpr long MAX_DIM = 512;  // of a head, as in worker/native/attention.py

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#ifdef __AVX512F__

// Sixteen floats that stay in registers: gcc keeps vectors wider than its instruction set's in memory.
typedef __m512 Wide;

inline Wide zeros() { return _mm512_setzero_ps(); }
inline Wide all(float value) { return _mm512_set1_ps(value); }
inline Wide add_product(Wide c, Wide a, Wide b) { return _mm512_fmadd_ps(a, b, c); }
inline Wide quotient(Wide a, float b) { return _mm512_div_ps(a, all(b)); }
inline void store_wide(float* to, Wide value) { _mm512_storeu_ps(to, value); }

inline Wide load_wide(const float* from) { return _mm512_loadu_ps(from); }

inline Wide load_wide(const BFloat16* from) {
  typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2)));
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Wide>(__builtin_convertvector(bits, Ints) << 16);
}

inline Wide load_wide(const Float16* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

#else

struct Wide {
  __m256 low, high;
};

inline Wide zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Wide all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline Wide add_product(Wide c, Wide a, Wide b) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Wide quotient(Wide a, float b) {
  return {_mm256_div_ps(a.low, _mm256_set1_ps(b)), _mm256_div_ps(a.high, _mm256_set1_ps(b))};
}

inline void store_wide(float* to, Wide value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}

inline __m256 load_half(const float* from) { return _mm256_loadu_ps(from); }

inline __m256 load_half(const BFloat16* from) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

inline __m256 load_half(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <class Element>
Wide load_wide(const Element* from) {
  return {load_half(from), load_half(from + 8)};
}

#endif

// Loads the first `count` of sixteen, or all if that is more; the others are 0.
template <class Element>
Wide load_wide_some(const Element* from, long count) {
  if (count >= LANES) return load_wide(from);
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
