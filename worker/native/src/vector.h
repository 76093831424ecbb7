// Sixteen floats at a time, on the instruction sets that the kernels are built for, with the same bits on each.
//
// An operation rounds once; sums of lanes go in one order: a result depends neither on the instruction set nor on where
// in a tensor a number stands. (Fused multiply-adds are used by name where a kernel's accuracy wants them.)

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace spanwise {

constexpr long LANES = 16;

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));

inline Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Loads the first `count` lanes, or all if that is more; the others are 0.
inline Floats load_some(const float* from, long count) {
  if (count >= LANES) return load(from);
  Floats out = {};
  std::memcpy(&out, from, static_cast<unsigned long>(count) * sizeof(float));
  return out;
}

inline void store_some(float* to, Floats value, long count) {
  if (count >= LANES) return store(to, value);
  std::memcpy(to, &value, static_cast<unsigned long>(count) * sizeof(float));
}

inline Floats broadcast(float value) { return Floats{} + value; }

inline Ints bits_of(Floats value) { return reinterpret_cast<Ints>(value); }
inline Floats floats_of(Ints bits) { return reinterpret_cast<Floats>(bits); }
inline Floats magnitude(Floats value) { return floats_of(bits_of(value) & 0x7fffffff); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }
inline Ints cut_off(Floats value) { return __builtin_convertvector(value, Ints); }

// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                  reinterpret_cast<__m512>(c)));
#else
  Floats out;
  for (long i = 0; i < LANES; i += 8) {
    const __m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(&a) + i),
                                       _mm256_loadu_ps(reinterpret_cast<const float*>(&b) + i),
                                       _mm256_loadu_ps(reinterpret_cast<const float*>(&c) + i));
    _mm256_storeu_ps(reinterpret_cast<float*>(&out) + i, sum);
  }
  return out;
#endif
}

// Adds all lanes: halves onto each other.
inline float sum(Floats value) {
  for (long half = LANES / 2; half; half /= 2)
    for (long i = 0; i < half; ++i) value[i] += value[i + half];
  return value[0];
}

inline float largest(Floats value) {
  for (long half = LANES / 2; half; half /= 2)
    for (long i = 0; i < half; ++i) value[i] = value[i] > value[i + half] ? value[i] : value[i + half];
  return value[0];
}

// e^x within 1 unit in the last place; denormal below -87.3, 0 from -104 down, infinity above 88.7, NaN for NaN.
// Cephes' expf (https://www.netlib.org/cephes/): reduce by multiples of ln 2, then a polynomial of degree 6.
inline Floats exponential(Floats x) {
  const Floats clamped = x > 89.0f ? broadcast(89.0f) : (x < -104.0f ? broadcast(-104.0f) : x);
  const Floats shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = cut_off(n);
  const Ints half = exponent >> 1;  // in two steps, so that neither leaves the range of exponents
  const Floats scaled = p * floats_of((half + 127) << 23) * floats_of((exponent - half + 127) << 23);
  return x != x ? x : scaled;
}

}  // namespace spanwise
