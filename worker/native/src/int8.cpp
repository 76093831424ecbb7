// 8-bit linear layers: quantizes input rows, multiplies them with packed weights exactly in integers, and scales.
//
// What is computed is described in worker/linear/int8.py; this gives the same bits in one call. It differs in how it
// takes outliers: a row's outlier columns are few, so their 16-bit digits are multiplied column by column of the row,
// beside the product of its other codes.
//
// A packed weight has a panel for 16 outputs: for every four inputs (a quad) the four weights of each output plus 128.
// Quantized rows stand in tiles of up to TILE_ROWS rows: for every quad, the four codes of each row.

#include <immintrin.h>

#include <cmath>
#include <cstddef>

#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "vector.h"

namespace spanwise {
namespace {

constexpr long PANEL = LANES, QUAD = 4, WEIGHT_ZERO = 128, INPUT_ZERO = 128;
constexpr long LARGEST_CODE = 127, LARGEST_DIGITS = 127 * 256;
constexpr float TINY = 1e-30f;
constexpr double MEAN_FACTOR = 10, MEAN_STEPS = 32767;  // see MEAN_FACTOR in worker/linear/int8.py
constexpr long PANEL_GROUP = 4;
constexpr int32_t INFINITE = 0x7f800000;      // the bits of infinity, above which those of NaN are
constexpr long SERIAL_INPUTS = 1 << 14;       // of all rows: below that waking threads takes longer than quantizing
#if defined(__AVX512VNNI__)
constexpr long TILE_ROWS = 16;  // sums that stay in registers; weights are read once for all
#else
constexpr long TILE_ROWS = 2;
#endif

struct Outlier {
  int32_t quad;      // where in the row
  int32_t high, low;  // four signed digits each, 0 where an input of the quad is none
};

struct Row {
  float scale = 0, outlier_scale = 0;
  int32_t sum = 0, high_sum = 0, low_sum = 0;  // of codes and digits: what the weights' offset of 128 adds
  long num_outliers = 0;
  Outlier* outliers = nullptr;
};

// What happens to a row before it is quantized: a block's norm or gated activation, without a way through memory.
enum Prologue : int64_t { NONE, RMS_NORM, GATE };

struct Call {
  const float* input;
  Prologue prologue;
  const float* norm_weight;
  float epsilon;
  long num_rows, num_columns, num_quads;
  const uint8_t* packed;
  const float* weight_scale;
  const float* bias;
  const float* residual;  // what the result is added to, or null
  long num_out;
  float* out;
  float threshold;    // infinity: there are no outliers
  float mean_factor;  // what makes a row's limit of its mean magnitude in steps
  int8_t* codes;
  Row* rows;
  Outlier* outliers;  // room for one per quad and row

  long num_tiles() const { return (num_rows + TILE_ROWS - 1) / TILE_ROWS; }
  long tile_start(long tile) const { return std::min(num_rows, tile * TILE_ROWS); }

  // Returns a row as it is to be quantized, computed into `memory` if need be.
  const float* row(long index, float* memory) const {
    const float* from = input + index * num_columns * (prologue == GATE ? 2 : 1);
    if (prologue == NONE) return from;
    if (prologue == RMS_NORM) norm_row(from, norm_weight, epsilon, memory, num_columns);
    if (prologue == GATE) gate_row(from, from + num_columns, memory, num_columns);
    return memory;
  }
};

int32_t quad_sum(int32_t digits) {
  int8_t each[QUAD];
  std::memcpy(each, &digits, QUAD);
  return each[0] + each[1] + each[2] + each[3];
}

int32_t largest_of(Ints lanes) {
  int32_t out = 0;
  for (long lane = 0; lane < LANES; ++lane) out = lanes[lane] > out ? lanes[lane] : out;
  return out;
}

// The largest magnitude as its bits: unlike floats, these compare NaN as largest.
int32_t largest_bits(const float* row, long count) {
  Ints most = {};
  for (long i = 0; i < count; i += LANES) {
    const Ints bits = bits_of(magnitude(load_some(row + i, count - i)));
    most = bits > most ? bits : most;
  }
  return largest_of(most);
}

float float_of(int32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

int8_t digit(int32_t whole) { return static_cast<int8_t>((whole & 255) - INPUT_ZERO); }

bool is_any(Ints mask) {
#if defined(__AVX512VNNI__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#else
  int32_t any = 0;
  for (long lane = 0; lane < LANES; ++lane) any |= mask[lane];
  return any != 0;
#endif
}

// From what magnitude on inputs of a row are outliers, given its largest one.
float outlier_limit(const Call& call, const float* input, float largest) {
  if (call.threshold == INFINITY || largest < TINY) return call.threshold;
  const float steps = static_cast<float>(MEAN_STEPS) / largest;
  Ints total = {};
  for (long i = 0; i < call.num_columns; i += LANES)
    total += cut_off(magnitude(load_some(input + i, call.num_columns - i)) * steps);
  int64_t sum = 0;
  for (long lane = 0; lane < LANES; ++lane) sum += total[lane];
  return std::min(static_cast<float>(sum) * call.mean_factor * largest, call.threshold);
}

// Lists the outliers of a quad.
void add_outliers(const Call& call, Row& row, const float* input, float limit, long quad) {
  int8_t high[QUAD] = {}, low[QUAD] = {};
  bool is_found = false;
  for (long i = 0; i < QUAD && quad * QUAD + i < call.num_columns; ++i) {
    const float x = input[quad * QUAD + i];
    if (!(std::fabs(x) >= limit)) continue;
    const int32_t whole = static_cast<int32_t>(x / row.outlier_scale + (257 * INPUT_ZERO + 0.5f));
    high[i] = digit(whole >> 8), low[i] = digit(whole), is_found = true;
  }
  if (!is_found) return;
  Outlier& added = row.outliers[row.num_outliers++];
  added.quad = static_cast<int32_t>(quad);
  std::memcpy(&added.high, high, QUAD);
  std::memcpy(&added.low, low, QUAD);
  row.high_sum += quad_sum(added.high), row.low_sum += quad_sum(added.low);
}

// Lists a row's outliers; returns the largest of its other magnitudes.
float take_outliers(const Call& call, Row& row, const float* input, float limit) {
  Ints most = {};
  for (long i = 0; i < call.num_columns; i += LANES) {
    const Floats x = magnitude(load_some(input + i, call.num_columns - i));
    const Ints bits = bits_of(x >= limit ? Floats{} : x);
    most = bits > most ? bits : most;
    if (!is_any(x >= limit)) continue;
    const long stop = std::min(call.num_quads, (i + LANES) / QUAD);
    for (long quad = i / QUAD; quad < stop; ++quad) add_outliers(call, row, input, limit, quad);
  }
  return float_of(largest_of(most));
}

// Writes a row's codes into its tile, whose rows stand `stride` bytes apart per quad.
int32_t write_codes(const float* input, long count, float scale, float limit, int8_t* codes, long stride) {
  Ints total = {};
  for (long i = 0; i < count; i += LANES) {
    Floats x = load_some(input + i, count - i);
    x = (magnitude(x) >= limit) | (x != x) ? Floats{} : x;
    const Ints code = cut_off(x / scale + (INPUT_ZERO + 0.5f)) - static_cast<int32_t>(INPUT_ZERO);
    total += code;
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    for (long quad = 0; quad < LANES / QUAD && i + quad * QUAD < count; ++quad)
      std::memcpy(codes + (i / QUAD + quad) * stride, reinterpret_cast<const char*>(&bytes) + quad * QUAD, QUAD);
  }
  int32_t out = 0;
  for (long lane = 0; lane < LANES; ++lane) out += total[lane];
  return out;
}

// Quantizes a row, whose outliers are to stand at `outliers`.
void quantize(const Call& call, long index, Outlier* outliers, int8_t* codes, long stride) {
  Row& row = call.rows[index];
  row = Row{};
  thread_local Scratch scratch;
  const size_t row_bytes = static_cast<size_t>(call.num_columns) * sizeof(float);
  const float* input = call.row(index, reinterpret_cast<float*>(scratch.take(row_bytes)));
  const int32_t bits = largest_bits(input, call.num_columns);
  if (bits >= INFINITE) {
    write_codes(input, call.num_columns, 1.0f, -1.0f, codes, stride);  // zeros, which this makes NaN:
    row.scale = NAN;
    return;
  }
  float largest = float_of(bits);
  const float limit = outlier_limit(call, input, largest);
  if (largest >= limit) {
    row.outliers = outliers;
    row.outlier_scale = largest / LARGEST_DIGITS;
    largest = take_outliers(call, row, input, limit);
  }
  row.scale = (largest < TINY ? TINY : largest) / LARGEST_CODE;
  row.sum = write_codes(input, call.num_columns, row.scale, limit, codes, stride);
}

void quantize_rows(const Call& call, long first, long stop) {
  long tile = 0;
  Outlier* outliers = call.outliers + first * call.num_quads;
  for (long row = first; row < stop; ++row) {
    while (call.tile_start(tile + 1) <= row) ++tile;
    const long start = call.tile_start(tile), stride = (call.tile_start(tile + 1) - start) * QUAD;
    quantize(call, row, outliers, call.codes + start * call.num_quads * QUAD + (row - start) * QUAD, stride);
    outliers += call.rows[row].num_outliers;
  }
}

#if defined(__AVX512VNNI__)

using Sums = __m512i;

// Adds the products of a quad's weights with a row's four codes. Written out, since gcc makes two instructions of it and
// keeps sums in memory.
inline __attribute__((always_inline)) void add_products(Sums& sum, __m512i weights, const int8_t* codes) {
  struct Four {
    int8_t codes[QUAD];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const Four*>(codes)));
}

// Multiplies a panel, which `is_new` to the cache, with a tile of NUM rows; `sums` get the 16 outputs of each row, with
// the weights' offset in them.
template <long NUM>
inline __attribute__((always_inline)) void multiply(const uint8_t* panel, const int8_t* codes, long num_quads,
                                                    bool is_new, Sums* sums) {
  constexpr long STEPS = NUM >= 4 ? 1 : 4;  // quads at a time: a sum that waits for itself is slow
  Sums part[NUM * STEPS];
#pragma GCC unroll 16
  for (long i = 0; i < NUM * STEPS; ++i) part[i] = _mm512_setzero_si512();
  const auto add = [&](long quad, long step) __attribute__((always_inline)) {
    const __m512i weights = _mm512_loadu_si512(panel + quad * PANEL * QUAD);
    if (is_new) _mm_prefetch(reinterpret_cast<const char*>(panel + quad * PANEL * QUAD + 4096), _MM_HINT_T0);
#pragma GCC unroll 16
    for (long i = 0; i < NUM; ++i)
      add_products(part[i * STEPS + step], weights, codes + (quad * NUM + i) * QUAD);
  };
  long quad = 0;
  for (; quad + STEPS <= num_quads; quad += STEPS) {
#pragma GCC unroll 4
    for (long step = 0; step < STEPS; ++step) add(quad + step, step);
  }
  for (; quad < num_quads; ++quad) add(quad, 0);
#pragma GCC unroll 16
  for (long i = 0; i < NUM; ++i) {
    sums[i] = part[i * STEPS];
    for (long step = 1; step < STEPS; ++step) sums[i] = _mm512_add_epi32(sums[i], part[i * STEPS + step]);
  }
}

Ints ints_of(Sums sums) { return reinterpret_cast<Ints>(sums); }

#else

struct Sums {
  Ints value;
};

// As above, by products of 16-bit numbers, whose sums of two are exact: those of 8-bit ones saturate without VNNI.
template <long NUM>
inline __attribute__((always_inline)) void multiply(const uint8_t* panel, const int8_t* codes, long num_quads,
                                                    bool, Sums* sums) {
  constexpr long PARTS = 4;  // of four outputs, two sums each
  __m256i part[NUM][PARTS];
  for (auto& row : part)
    for (auto& sum : row) sum = _mm256_setzero_si256();
  for (long quad = 0; quad < num_quads; ++quad) {
    const auto* weights = reinterpret_cast<const __m128i*>(panel + quad * PANEL * QUAD);
    __m256i four[NUM];
    for (long i = 0; i < NUM; ++i) {
      int32_t bytes;
      std::memcpy(&bytes, codes + (quad * NUM + i) * QUAD, QUAD);
      four[i] = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(bytes)));
    }
    for (long p = 0; p < PARTS; ++p) {
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(weights + p));
      for (long i = 0; i < NUM; ++i)
        part[i][p] = _mm256_add_epi32(part[i][p], _mm256_madd_epi16(wide, four[i]));
    }
  }
  for (long i = 0; i < NUM; ++i) {
    int32_t pairs[2 * PANEL];
    std::memcpy(pairs, part[i], sizeof pairs);
    for (long lane = 0; lane < PANEL; ++lane) sums[i].value[lane] = pairs[2 * lane] + pairs[2 * lane + 1];
  }
}

Ints ints_of(const Sums& sums) { return sums.value; }

#endif

struct Digits {
  Ints high, low;
};

// Returns what a row's outliers make with a panel's weights, whose offset is in it.
Digits multiply_outliers(const uint8_t* panel, const Row& row) {
  Digits total = {};
  for (const Outlier* one = row.outliers; one < row.outliers + row.num_outliers; ++one) {
    const uint8_t* weights = panel + one->quad * PANEL * QUAD;
#if defined(__AVX512VNNI__)
    const auto add = [&](Ints sums, int32_t digits) {
      return ints_of(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), _mm512_loadu_si512(weights),
                                         _mm512_set1_epi32(digits)));
    };
#else
    const auto add = [&](Ints sums, int32_t digits) {
      int8_t four[QUAD];
      std::memcpy(four, &digits, QUAD);
      for (long lane = 0; lane < PANEL; ++lane)
        for (long i = 0; i < QUAD; ++i) sums[lane] += weights[lane * QUAD + i] * four[i];
      return sums;
    };
#endif
    total = {add(total.high, one->high), add(total.low, one->low)};
  }
  return total;
}

Floats without_offset(Ints sums, int32_t digit_sum) {
  return to_floats(sums - static_cast<int32_t>(WEIGHT_ZERO) * digit_sum);
}

void finish(const Call& call, long panel, long index, Ints sums) {
  const Row& row = call.rows[index];
  const long first = panel * PANEL, count = std::min(PANEL, call.num_out - first);
  const Floats scale = load_some(call.weight_scale + first, count);
  Floats out = without_offset(sums, row.sum) * scale * row.scale;
  if (row.num_outliers) {
    const uint8_t* weights = call.packed + panel * call.num_quads * PANEL * QUAD;
    const Digits digits = multiply_outliers(weights, row);
    const Floats high = without_offset(digits.high, row.high_sum) * scale;
    const Floats low = without_offset(digits.low, row.low_sum) * scale;
    out += (high * 256.0f + low) * row.outlier_scale;
  }
  if (call.bias) out += load_some(call.bias + first, count);
  if (call.residual) out += load_some(call.residual + index * call.num_out + first, count);
  store_some(call.out + index * call.num_out + first, out, count);
}

template <long NUM>
void multiply_tile(const Call& call, long panel, long start) {
  Sums sums[NUM];
  multiply<NUM>(call.packed + panel * call.num_quads * PANEL * QUAD, call.codes + start * call.num_quads * QUAD,
                call.num_quads, start == 0, sums);
  for (long i = 0; i < NUM; ++i) finish(call, panel, start + i, ints_of(sums[i]));
}

using MultiplyTile = void (*)(const Call&, long, long);
#if defined(__AVX512VNNI__)
constexpr MultiplyTile BY_ROWS[TILE_ROWS] = {
    multiply_tile<1>,  multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
    multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>,  multiply_tile<10>, multiply_tile<11>, multiply_tile<12>,
    multiply_tile<13>, multiply_tile<14>, multiply_tile<15>, multiply_tile<16>};
#else
constexpr MultiplyTile BY_ROWS[TILE_ROWS] = {multiply_tile<1>, multiply_tile<2>};
#endif

// Takes panels together: outputs of a row that are written at a time are adjacent, and its codes stay in the cache.
void multiply_panels(const Call& call, long first, long stop) {
  for (long group = first; group < stop; group += PANEL_GROUP)
    for (long tile = 0; tile < call.num_tiles(); ++tile) {
      const long start = call.tile_start(tile);
      const MultiplyTile multiply_tile = BY_ROWS[call.tile_start(tile + 1) - start - 1];
      for (long panel = group; panel < std::min(stop, group + PANEL_GROUP); ++panel) multiply_tile(call, panel, start);
    }
}

}  // namespace
}  // namespace spanwise

using namespace spanwise;

// Packs int8 rows `[num_rows, num_columns]`, outputs `first_row, …` of a weight, into `packed`, which is full of 128.
extern "C" void spanwise_int8_pack(const int8_t* rows, int64_t first_row, int64_t num_rows, int64_t num_columns,
                                   uint8_t* packed, int64_t num_threads) {
  const long num_quads = (num_columns + QUAD - 1) / QUAD;
  in_shares(num_threads, num_rows, 1, [&](long first, long stop) {
    for (long row = first; row < stop; ++row) {
      const long out = first_row + row;
      uint8_t* to = packed + (out / PANEL * num_quads * PANEL + out % PANEL) * QUAD;
      const int8_t* from = rows + row * num_columns;
      for (long i = 0; i < num_columns; ++i)
        to[i / QUAD * PANEL * QUAD + i % QUAD] = static_cast<uint8_t>(from[i] ^ static_cast<int8_t>(0x80));
    }
  });
}

// Multiplies fp32 rows `[num_rows, num_columns]` with a packed weight; writes fp32 `[num_rows, num_out]`. The weight's
// scale and `bias` (which may be null) are fp32 `[num_out]`; inputs of at least `threshold` are outliers, infinity: none.
// With RMS_NORM rows are normalized first; with GATE they are `[num_rows, 2 * num_columns]`: gates, then what these are
// multiplied by.
// `residual` `[num_rows, num_out]`, unless null, is added.
extern "C" void spanwise_int8_linear(const float* input, int64_t num_rows, int64_t num_columns, int64_t prologue,
                                     const float* norm_weight, float epsilon, const uint8_t* packed,
                                     const float* weight_scale, const float* bias, int64_t num_out,
                                     const float* residual, float* out, float threshold, int64_t num_threads) {
  thread_local Scratch scratch;
  Call call = {};
  call.input = input, call.num_rows = num_rows, call.num_columns = num_columns;
  call.prologue = static_cast<Prologue>(prologue), call.norm_weight = norm_weight, call.epsilon = epsilon;
  call.num_quads = (num_columns + QUAD - 1) / QUAD;
  call.packed = packed, call.weight_scale = weight_scale, call.bias = bias, call.residual = residual;
  call.num_out = num_out, call.out = out, call.threshold = threshold;
  call.mean_factor = static_cast<float>(MEAN_FACTOR / (MEAN_STEPS * static_cast<double>(num_columns)));
  const size_t row_bytes = (static_cast<size_t>(num_rows) * sizeof(Row) + 63) / 64 * 64;
  const size_t code_bytes = (static_cast<size_t>(num_rows * call.num_quads * QUAD) + 63) / 64 * 64;
  char* memory = scratch.take(row_bytes + code_bytes + code_bytes / QUAD * sizeof(Outlier));
  call.codes = reinterpret_cast<int8_t*>(memory);
  call.rows = reinterpret_cast<Row*>(memory + code_bytes);
  call.outliers = reinterpret_cast<Outlier*>(memory + code_bytes + row_bytes);
  const bool is_short = num_rows * num_columns < SERIAL_INPUTS;
  in_shares(is_short ? 1 : num_threads, num_rows, 1, [&](long first, long stop) { quantize_rows(call, first, stop); });
  in_shares(num_threads, (num_out + PANEL - 1) / PANEL, 1,
            [&](long first, long stop) { multiply_panels(call, first, stop); });
}
