// Products of rows with 4-bit weights as they are stored: codes of four bits, high nibble first, and an absmax for each
// block of 64 parameters along a row.
//
// Sixteen outputs are computed at a time, one per lane. Their codes are transposed 32 bits at a time, so that a lane
// holds eight codes of its output; shifting the words by a nibble and looking the lowest one up gives what is
// multiplied next with one input, the same for all lanes. Inputs are laid out once in the order in which that meets
// them. A block's products are summed in fp32 and scaled by its absmax, and blocks added up in order: so a result's bits depend neither
// on other rows, nor on threads, nor on how many outputs a call has.
//
// What is multiplied are floats, or pairs of bf16 where inputs are bf16 and the CPU multiplies those (avx512_bf16).

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "elements.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

#define INLINED __attribute__((always_inline))

namespace spanwise {
namespace {

constexpr long BLOCK = 64;         // parameters that share an absmax
constexpr long BLOCK_BYTES = 32;   // of their codes
constexpr long BLOCK_WORDS = 8;    // of 32 bits, eight codes each
constexpr long NESTED_BLOCK = 256;  // absmaxes that share one of their own

#if defined(__AVX512F__)
constexpr long GROUP = 12;  // rows multiplied at a time, so that their sums stay in registers
constexpr long TILES = 2;   // of sixteen outputs that many rows are multiplied with at a time
#else
constexpr long GROUP = 5;
constexpr long TILES = 1;
#endif

#if defined(__AVX512F__)

typedef __m512i Codes;  // 32 bits of each of sixteen outputs

// Returns what nibble `step` of each output stands for.
inline Wide look_up(Wide values, Codes codes, long step) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * step)), values);
}

// Loads a block of sixteen outputs: lane n of word w gets bytes 4w to 4w+3 of output n.
inline void transpose(const uint8_t* const* outputs, long offset, Codes* words) {
  __m512i part[8], quad[8];
  for (long i = 0; i < 8; ++i) {
    const long first = i / 4 * 8 + i % 4;
    const auto low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(outputs[first] + offset));
    const auto high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(outputs[first + 4] + offset));
    part[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  for (long i = 0; i < 8; i += 4) {
    const auto a = _mm512_unpacklo_epi32(part[i], part[i + 1]), b = _mm512_unpackhi_epi32(part[i], part[i + 1]);
    const auto c = _mm512_unpacklo_epi32(part[i + 2], part[i + 3]), d = _mm512_unpackhi_epi32(part[i + 2], part[i + 3]);
    quad[i] = _mm512_unpacklo_epi64(a, c), quad[i + 1] = _mm512_unpackhi_epi64(a, c);
    quad[i + 2] = _mm512_unpacklo_epi64(b, d), quad[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (long i = 0; i < 4; ++i) {
    words[i] = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88);
    words[i + 4] = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xdd);
  }
}

#else

struct Codes {
  __m256i low, high;
};

inline __m256 look_up_half(Wide values, __m256i nibbles) {
  const __m256 low = _mm256_permutevar8x32_ps(values.low, nibbles);
  const __m256 high = _mm256_permutevar8x32_ps(values.high, nibbles);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)));
}

inline Wide look_up(Wide values, Codes codes, long step) {
  const int shift = static_cast<int>(4 * step);
  return {look_up_half(values, _mm256_srli_epi32(codes.low, shift)),
          look_up_half(values, _mm256_srli_epi32(codes.high, shift))};
}

inline void transpose(const uint8_t* const* outputs, long offset, Codes* words) {
  for (long half = 0; half < 2; ++half) {
    __m256i part[8], quad[8];
    for (long i = 0; i < 8; ++i)
      part[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(outputs[8 * half + i] + offset));
    for (long i = 0; i < 8; i += 4) {
      const auto a = _mm256_unpacklo_epi32(part[i], part[i + 1]), b = _mm256_unpackhi_epi32(part[i], part[i + 1]);
      const auto c = _mm256_unpacklo_epi32(part[i + 2], part[i + 3]);
      const auto d = _mm256_unpackhi_epi32(part[i + 2], part[i + 3]);
      quad[i] = _mm256_unpacklo_epi64(a, c), quad[i + 1] = _mm256_unpackhi_epi64(a, c);
      quad[i + 2] = _mm256_unpacklo_epi64(b, d), quad[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (long i = 0; i < 4; ++i) {
      (half ? words[i].high : words[i].low) = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
      (half ? words[i + 4].high : words[i + 4].low) = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
  }
}

#endif

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Inputs and values as floats. Step s of a word takes nibble s, which is parameter s ^ 1 of the word's eight.
class Singles {
 public:
  static constexpr long STEPS = 8;

  explicit Singles(const float* values) : values_(load_wide(values)) {}

  Wide take(Codes word, long step) const { return look_up(values_, word, step); }

  static void add(Wide& sum, Wide value, const uint32_t* input) {
    float x;
    std::memcpy(&x, input, sizeof x);
    sum = add_product(sum, value, all(x));
  }

  template <class Element>
  static uint32_t lay_out(const Element* word, long step) {
    const float x = widen(word[step ^ 1]);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }

 private:
  Wide values_;
};

#if defined(__AVX512F__)

// Inputs and values as pairs of bf16. Step s of a word takes nibbles s and s + 4.
class Pairs {
 public:
  static constexpr long STEPS = 4;

  explicit Pairs(const float* values) {
    BFloat16 twice[32];  // the upper bit of five that the lookup takes is the next nibble's
    for (long i = 0; i < 32; ++i) narrow(twice + i, values[i % 16]);
    std::memcpy(&values_, twice, sizeof values_);
  }

  Wide take(Codes word, long step) const {
    const Codes shifted = _mm512_srli_epi32(word, static_cast<unsigned>(4 * step));
    return reinterpret_cast<Wide>(_mm512_permutexvar_epi16(shifted, values_));
  }

  // (In assembler, since the rest is for CPUs that lack this instruction too.)
  static void add(Wide& sum, Wide value, const uint32_t* input) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(value), "m"(*input));
  }

  static uint32_t lay_out(const BFloat16* word, long step) {
    return word[step ^ 1].bits | static_cast<uint32_t>(word[(step + 4) ^ 1].bits) << 16;
  }

 private:
  __m512i values_;
};

inline bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }

#else

using Pairs = Singles;
inline bool has_pairs() { return false; }

#endif

// Calls `body` with a constant that equals `count`, of 1 to MOST.
template <long MOST, class Body>
void with_constant(long count, const Body& body) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_constant<MOST - 1>(count, body);
  body(std::integral_constant<long, MOST>{});
}

template <class Body, long... I>
INLINED inline void repeat(std::integer_sequence<long, I...>, const Body& body) {
  (body(std::integral_constant<long, I>{}), ...);
}

// Calls `body` with constants 0 to COUNT - 1: arrays that it indexes with them stay in registers.
template <long COUNT, class Body>
INLINED inline void repeat(const Body& body) {
  repeat(std::make_integer_sequence<long, COUNT>{}, body);
}

// Rows `[num_rows, num_in]`, laid out as `[block][group of rows][step][row]`; the last group may have fewer rows.
struct Inputs {
  const uint32_t* data;
  long num_rows, num_blocks;

  // Tells where a group's begin.
  template <class Kind>
  long index(long block, long first_row) const {
    return (block * num_rows + first_row) * BLOCK_WORDS * Kind::STEPS;
  }
};

template <class Kind, class Element>
void lay_out(const Inputs& inputs, uint32_t* data, const Element* rows, long first_block, long stop_block) {
  for (long block = first_block; block < stop_block; ++block) {
    for (long row = 0; row < inputs.num_rows; ++row) {
      const long first = row / GROUP * GROUP, step = std::min(GROUP, inputs.num_rows - first);
      uint32_t* to = data + inputs.index<Kind>(block, first) + (row - first);
      const Element* from = rows + (row * inputs.num_blocks + block) * BLOCK;
      for (long word = 0; word < BLOCK_WORDS; ++word, from += 8)
        for (long i = 0; i < Kind::STEPS; ++i, to += step) *to = Kind::lay_out(from, i);
    }
  }
}

// Some adjacent outputs of a weight, as stored.
struct Weight {
  const uint8_t* codes;  // [num_out, num_in / 2]
  const void* absmax;    // [num_out, num_in / 64] floats, or codes of what `nested` scales
  const float* nested;   // of the whole weight, or none
  const float* map;      // what the 256 codes of absmaxes mean
  float offset;          // added to those
  long first_block;      // of this piece within the weight
  long num_out, num_blocks;

  // Writes a row's absmaxes to every `step`th float.
  void decode_absmax(long row, float* to, long step) const {
    const long begin = row * num_blocks;
    if (!nested) {
      for (long i = 0; i < num_blocks; ++i) to[i * step] = static_cast<const float*>(absmax)[begin + i];
      return;
    }
    const uint8_t* from = static_cast<const uint8_t*>(absmax) + begin;
    for (long i = 0; i < num_blocks;) {
      const long index = first_block + begin + i;
      const long stop = std::min(num_blocks, i + NESTED_BLOCK - index % NESTED_BLOCK);
      const float factor = nested[index / NESTED_BLOCK];
      for (; i < stop; ++i) to[i * step] = map[from[i]] * factor + offset;
    }
  }
};

// Sixteen outputs; where fewer are left, the last one stands for the missing ones.
class Tile {
 public:
  Tile() = default;

  // Decodes absmaxes too, to `[num_blocks, step]` floats from `absmax` on.
  Tile(const Weight& weight, long first, float* absmax, long step) : bytes_(LANES * BLOCK_BYTES * weight.num_blocks) {
    for (long lane = 0; lane < LANES; ++lane) {
      const long row = std::min(first + lane, weight.num_out - 1);
      codes_[lane] = weight.codes + row * weight.num_blocks * BLOCK_BYTES;
      weight.decode_absmax(row, absmax + lane, step);
    }
  }

  // Loads a block, and has as much of the next tile brought to the cache: sixteen rows at once are no pattern that the
  // processor foresees.
  void load_block(long block, Codes* words) const {
    const uint8_t* next = codes_[0] + bytes_ + block * LANES * BLOCK_BYTES;
    for (long i = 0; i < LANES * BLOCK_BYTES; i += 64) __builtin_prefetch(next + i, 0, 2);
    transpose(codes_, block * BLOCK_BYTES, words);
  }

 private:
  const uint8_t* codes_[LANES];
  long bytes_;
};

// Where results go: floats or bf16, as rows are.
struct Results {
  void* data;        // [num_rows, stride]
  const void* bias;  // of each output, or none
  long stride;
  bool is_bf16;

  void write(long row, long first, Wide sums, long count) const {
    if (is_bf16)
      write_as<BFloat16>(row, first, sums, count);
    else
      write_as<float>(row, first, sums, count);
  }

 private:
  template <class Element>
  void write_as(long row, long first, Wide sums, long count) const {
    float sum[LANES];
    store_wide(sum, sums);
    const auto* added = static_cast<const Element*>(bias);
    Element* to = static_cast<Element*>(data) + row * stride + first;
    for (long i = 0; i < count; ++i) narrow(to + i, added ? sum[i] + widen(added[first + i]) : sum[i]);
  }
};

template <class Kind>
class Product {
 public:
  Product(const Kind& kind, const Inputs& inputs, const Weight& weight, const Results& results)
      : kind_(kind), inputs_(inputs), weight_(weight), results_(results) {}

  // Computes outputs `[first, stop)`.
  void compute(long first, long stop) const {
    if (inputs_.num_rows <= GROUP)
      with_constant<GROUP>(inputs_.num_rows, [&](auto rows) { multiply_few<rows.value>(first, stop); });
    else
      multiply_many(first, stop);
  }

 private:
  static constexpr long ITEMS = BLOCK_WORDS * Kind::STEPS;  // of a block, multiplied one after the other

  // Multiplies codes as they are looked up, of several blocks in turn: their sums do not wait for each other.
  template <long ROWS>
  void multiply_few(long first, long stop) const {
    constexpr long AT_ONCE = ROWS <= 2 ? 4 : ROWS <= 4 ? 2 : 1;
    float* absmax = scratch(weight_.num_blocks * LANES);
    for (; first < stop; first += LANES) {
      const Tile tile(weight_, first, absmax, LANES);
      Wide totals[ROWS] = {};
      long block = 0;
      for (; block + AT_ONCE <= weight_.num_blocks; block += AT_ONCE)
        multiply_blocks<ROWS, AT_ONCE>(tile, block, absmax, totals);
      for (; block < weight_.num_blocks; ++block) multiply_blocks<ROWS, 1>(tile, block, absmax, totals);
      for (long row = 0; row < ROWS; ++row) write(row, first, totals[row], stop);
    }
  }

  template <long ROWS, long BLOCKS>
  __attribute__((noinline)) void multiply_blocks(const Tile& tile, long first, const float* absmax,
                                                 Wide* totals) const {
    const uint32_t* input = inputs_.data + inputs_.template index<Kind>(first, 0);
    Codes words[BLOCKS][BLOCK_WORDS];
    for (long block = 0; block < BLOCKS; ++block) tile.load_block(first + block, words[block]);
    Wide sums[BLOCKS * ROWS] = {};
    for (long word = 0; word < BLOCK_WORDS; ++word)
      repeat<Kind::STEPS>([&](auto step) INLINED {
        repeat<BLOCKS>([&](auto block) INLINED {
          const Wide value = kind_.take(words[block][word], step);
          const uint32_t* x = input + (block * ITEMS + word * Kind::STEPS + step) * ROWS;
          repeat<ROWS>([&](auto row) INLINED { Kind::add(sums[block * ROWS + row], value, x + row); });
        });
      });
    repeat<BLOCKS>([&](auto block) INLINED {
      const Wide scale = load_wide(absmax + (first + block) * LANES);
      repeat<ROWS>([&](auto row) INLINED { totals[row] = add_product(totals[row], scale, sums[block * ROWS + row]); });
    });
  }

  // Looks a block's codes up once for all groups of rows.
  void multiply_many(long first, long stop) const {
    const long num_rows = inputs_.num_rows, width = TILES * LANES;
    float* absmax = scratch((weight_.num_blocks + num_rows) * width);
    float* totals = absmax + weight_.num_blocks * width;
    for (; first < stop; first += width) {
      std::memset(totals, 0, static_cast<size_t>(num_rows * width) * sizeof(float));
      Tile tiles[TILES];
      for (long i = 0; i < TILES; ++i) tiles[i] = Tile(weight_, first + i * LANES, absmax + i * LANES, width);
      for (long block = 0; block < weight_.num_blocks; ++block) {
        alignas(64) Wide values[ITEMS][TILES];
        for (long i = 0; i < TILES; ++i) look_up_block(tiles[i], block, &values[0][i]);
        for (long row = 0; row < num_rows; row += GROUP)
          with_constant<GROUP>(std::min(GROUP, num_rows - row), [&](auto rows) {
            const uint32_t* input = inputs_.data + inputs_.template index<Kind>(block, row);
            multiply_group<rows.value>(values, input, absmax + block * width, totals + row * width);
          });
      }
      for (long row = 0; row < num_rows; ++row)
        for (long i = 0; i < TILES; ++i)
          write(row, first + i * LANES, load_wide(totals + (row * TILES + i) * LANES), stop);
    }
  }

  void look_up_block(const Tile& tile, long block, Wide* to) const {
    Codes words[BLOCK_WORDS];
    tile.load_block(block, words);
    repeat<ITEMS>([&](auto i) INLINED { to[i * TILES] = kind_.take(words[i / Kind::STEPS], i % Kind::STEPS); });
  }

  template <long ROWS>
  static __attribute__((noinline)) void multiply_group(const Wide (*values)[TILES], const uint32_t* input,
                                                       const float* absmax, float* totals) {
    Wide sums[ROWS * TILES] = {};
    for (long item = 0; item < ITEMS; ++item, input += ROWS)
      repeat<ROWS * TILES>([&](auto i) INLINED { Kind::add(sums[i], values[item][i % TILES], input + i / TILES); });
    repeat<ROWS * TILES>([&](auto i) INLINED {
      float* total = totals + i * LANES;
      store_wide(total, add_product(load_wide(total), load_wide(absmax + i % TILES * LANES), sums[i]));
    });
  }

  void write(long row, long first, Wide sums, long stop) const {
    if (first < stop) results_.write(row, first, sums, std::min(LANES, stop - first));
  }

  static float* scratch(long count) {
    static thread_local Scratch memory;
    return reinterpret_cast<float*>(memory.take(static_cast<size_t>(count) * sizeof(float)));
  }

  Kind kind_;
  const Inputs& inputs_;
  const Weight& weight_;
  const Results& results_;
};

template <class Kind>
void multiply(const Inputs& inputs, const Weight& weight, const Results& results, const float* values,
              long num_threads) {
  const Product<Kind> product(Kind(values), inputs, weight, results);
  in_shares(num_threads, weight.num_out, TILES * LANES, [&](long first, long stop) { product.compute(first, stop); });
}

}  // namespace
}  // namespace spanwise

extern "C" {

// Lays out `rows`, [num_rows, num_in] of floats or bf16, for the product. `inputs` has 4 bytes for each input.
void spanwise_nf4_lay_out(void* inputs, const void* rows, int64_t num_rows, int64_t num_in, int64_t is_bf16,
                          int64_t num_threads) {
  using namespace spanwise;
  const Inputs layout = {nullptr, num_rows, num_in / BLOCK};
  const auto to = static_cast<uint32_t*>(inputs);
  const long step = std::max(1L, (1L << 15) / (num_rows * BLOCK));  // blocks that are worth another thread
  in_shares(num_threads, layout.num_blocks, step, [&](long first, long stop) {
    if (!is_bf16)
      lay_out<Singles>(layout, to, static_cast<const float*>(rows), first, stop);
    else if (has_pairs())
      lay_out<Pairs>(layout, to, static_cast<const BFloat16*>(rows), first, stop);
    else
      lay_out<Singles>(layout, to, static_cast<const BFloat16*>(rows), first, stop);
  });
}

// Multiplies inputs that were laid out with `num_out` outputs of a weight whose codes stand for `values`; `out` and
// `bias` are of the rows' type. See Weight and Results.
void spanwise_nf4_multiply(void* out, const void* inputs, const void* codes, const void* absmax, const void* nested,
                           const void* map, const void* values, const void* bias, float offset, int64_t first_block,
                           int64_t num_rows, int64_t num_in, int64_t num_out, int64_t stride, int64_t is_bf16,
                           int64_t num_threads) {
  using namespace spanwise;
  const auto floats = [](const void* data) { return static_cast<const float*>(data); };
  const Inputs rows = {static_cast<const uint32_t*>(inputs), num_rows, num_in / BLOCK};
  const Weight weight = {static_cast<const uint8_t*>(codes), absmax, floats(nested), floats(map), offset, first_block,
                         num_out, rows.num_blocks};
  const Results results = {out, bias, stride, is_bf16 != 0};
  if (is_bf16 && has_pairs())
    multiply<Pairs>(rows, weight, results, floats(values), num_threads);
  else
    multiply<Singles>(rows, weight, results, floats(values), num_threads);
}

}  // extern "C"
