// What a block does to rows between its linear layers: RMS norms and gated activations, each in one pass over memory.

#include "rows.h"

#include "parallel.h"

namespace spanwise {
namespace {

constexpr long SERIAL_NUMBERS = 1 << 15;  // of all rows: below that waking threads takes longer than computing

long threads_for(long num_threads, long count) { return count < SERIAL_NUMBERS ? 1 : num_threads; }

}  // namespace
}  // namespace spanwise

using namespace spanwise;

// Writes `x / sqrt(mean(x^2) + epsilon) * weight` of fp32 rows `[num_rows, size]`; `weight` is fp32 `[size]`.
extern "C" void spanwise_rms_norm(const float* input, const float* weight, float epsilon, float* out, int64_t num_rows,
                                  int64_t size, int64_t num_threads) {
  in_shares(threads_for(num_threads, num_rows * size), num_rows, 1, [&](long first, long stop) {
    for (long row = first; row < stop; ++row)
      norm_row(input + row * size, weight, epsilon, out + row * size, size);
  });
}

// Writes `silu(gate) * up` of fp32 rows of `size` numbers, which stand `stride` apart in `gate` and in `up`.
extern "C" void spanwise_silu_multiply(const float* gate, const float* up, int64_t stride, float* out, int64_t num_rows,
                                       int64_t size, int64_t num_threads) {
  in_shares(threads_for(num_threads, num_rows * size), num_rows * size, LANES, [&](long first, long stop) {
    for (long at = first; at < stop;) {
      const long row = at / size, column = at % size;
      const long end = std::min(size, column + stop - at);
      const long from = row * stride + column;
      gate_row(gate + from, up + from, out + row * size + column, end - column);
      at += end - column;
    }
  });
}
