// What is done to one row of fp32 numbers; kernels that take rows do it on the way.

#pragma once

#include <cmath>

#include "vector.h"

namespace spanwise {

inline float mean_square(const float* row, long size) {
  constexpr long CHAINS = 4;  // sums that do not wait for each other
  Floats total[CHAINS] = {};
  for (long i = 0; i < size; i += CHAINS * LANES)
    for (long chain = 0; chain < CHAINS; ++chain) {
      const long start = i + chain * LANES;
      const Floats x = start < size ? load_some(row + start, size - start) : Floats{};
      total[chain] += x * x;
    }
  return sum((total[0] + total[1]) + (total[2] + total[3])) / static_cast<float>(size);
}

// Writes `x / sqrt(mean(x^2) + epsilon) * weight`.
inline void norm_row(const float* row, const float* weight, float epsilon, float* out, long size) {
  const float factor = 1.0f / std::sqrt(mean_square(row, size) + epsilon);
  for (long i = 0; i < size; i += LANES) {
    const Floats normed = load_some(row + i, size - i) * factor;
    store_some(out + i, normed * load_some(weight + i, size - i), size - i);
  }
}

// Writes `silu(gate) * up`.
inline void gate_row(const float* gate, const float* up, float* out, long size) {
  for (long i = 0; i < size; i += LANES) {
    const Floats x = load_some(gate + i, size - i);
    const Floats silu = x / (1.0f + exponential(-x));
    store_some(out + i, silu * load_some(up + i, size - i), size - i);
  }
}

}  // namespace spanwise
