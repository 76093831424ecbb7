// What a block does to rows between its linear layers: RMS norms and gated activations, each in one pass over memory.

#include <cmath>

#include "parallel.h"
#include "vector.h"

namespace spanwise {
namespace {

constexpr long SERIAL_NUMBERS = 1 << 15;  // of all rows: below that waking threads takes longer than computing

long threads_for(long num_threads, long count) { return count < SERIAL_NUMBERS ? 1 : num_threads; }

float mean_square(const float* row, long size) {
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

}  // namespace
}  // namespace spanwise

using namespace spanwise;

// Writes `x / sqrt(mean(x^2) + epsilon) * weight` of fp32 rows `[num_rows, size]`; `weight` is fp32 `[size]`.
extern "C" void spanwise_rms_norm(const float* input, const float* weight, float epsilon, float* out, int64_t num_rows,
                                  int64_t size, int64_t num_threads) {
  in_shares(threads_for(num_threads, num_rows * size), num_rows, 1, [&](long first, long stop) {
    for (long row = first; row < stop; ++row) {
      const float* from = input + row * size;
      const float factor = 1.0f / std::sqrt(mean_square(from, size) + epsilon);
      for (long i = 0; i < size; i += LANES) {
        const Floats normed = load_some(from + i, size - i) * factor;
        store_some(out + row * size + i, normed * load_some(weight + i, size - i), size - i);
      }
    }
  });
}

// Writes `silu(gate) * up` of fp32 rows of `size` numbers, which stand `stride` apart in `gate` and in `up`.
extern "C" void spanwise_silu_multiply(const float* gate, const float* up, int64_t stride, float* out, int64_t num_rows,
                                       int64_t size, int64_t num_threads) {
  in_shares(threads_for(num_threads, num_rows * size), num_rows * size, LANES, [&](long first, long stop) {
    for (long at = first; at < stop;) {
      const long row = at / size, column = at % size;
      const long end = std::min(size, column + stop - at);
      const float *gates = gate + row * stride, *ups = up + row * stride;
      for (long i = column; i < end; i += LANES) {
        const Floats x = load_some(gates + i, end - i);
        const Floats silu = x / (1.0f + exponential(-x));
        store_some(out + row * size + i, silu * load_some(ups + i, end - i), end - i);
      }
      at += end - column;
    }
  });
}
