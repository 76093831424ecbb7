// Attention of a step's tokens over the paged cache, in place.
//
// A token's positions are cut into parts, which are computed on their own and then put together in order: parts are
// what threads share out, and they depend on nothing but the token, so that its bits do not either. Adjacent tokens of a
// sequence are computed together, as long as they have the same parts: keys and values are read once for all of them.
// What a token must not see yet counts 0 for it.

#include <atomic>
#include <cmath>

#include "elements.h"
#include "parallel.h"
#include "vector.h"

namespace spanwise {
namespace {

constexpr long TILE = 64;        // slots that lie side by side, as in worker/kv_cache.py
constexpr long PART = 4 * TILE;  // positions, as in worker/native/attention.py
constexpr long ROWS = 8;         // heads of tokens that are computed at a time; as in worker/native/attention.py
#ifdef __AVX512F__
constexpr long SCORED = 4;              // heads whose products with four keys registers hold
constexpr long SUMMED = 4, COLUMNS = 4;  // heads and vectors of values whose sums registers hold
#else
constexpr long SCORED = 1;
constexpr long SUMMED = 2, COLUMNS = 2;
#endif

// Adjacent tokens, as the step's plan describes them.
struct Tokens {
  int64_t row;            // of the first one in the step
  int64_t count;          // more than 1 only if ROWS rows hold their heads of one KV head
  int64_t first_visible;  // position, of all of them
  int64_t position;       // the first one's own: the last that it sees
  int64_t first_tile;     // in the list of tiles: that of `first_visible`
  int64_t num_parts;
  int64_t first_partial;  // of several parts: for each, there is one per token
};

// Some positions that tokens see, counted from the start of their first tile.
struct Stretch {
  const int64_t* tiles;  // the first slot of each
  long first, stop;      // as the last token sees them
  long own_stop;         // as the first one does; the next one sees one more, as far as there are
  long distance;         // of position 0 from the first token's own: 0 or less

  long slot(long position) const { return tiles[position / TILE] + position % TILE; }
  long tile_stop(long position) const { return std::min(stop, (position / TILE + 1) * TILE); }
};

struct Call {
  float* out;          // [num_tokens, num_heads, head_dim]
  const float* query;  // like `out`, with strides
  int64_t query_token_stride, query_head_stride;
  int64_t num_slots;  // of the cache: keys and values are [num_kv_heads, num_slots, head_dim]
  const Tokens* tokens;
  const int64_t (*parts)[2];  // of which tokens, and which of theirs
  const int64_t* tiles;
  float* partials;  // [num_partials, num_heads, head_dim], then [num_partials, num_heads, 2]: greatest score, sum
  int64_t num_parts, num_partials, num_heads, num_kv_heads, head_dim;
  float scale;
  const float* slopes;  // [num_heads], or null

  float* ends() const { return partials + num_partials * num_heads * head_dim; }
};

// The heads of tokens that are computed together: all of the first token, then all of the next.
struct Rows {
  long num_tokens, first_head, num_heads;

  long count() const { return num_tokens * num_heads; }
  long token(long row) const { return row / num_heads; }
  long head(long row) const { return first_head + row % num_heads; }
};

#ifdef __AVX512F__

// Adds lanes of four vectors: four lanes of each are left.
Wide fold_four(const Wide (&parts)[4]) {
  Floats two[2];
  for (long i = 0; i < 2; ++i) {
    const Floats a = reinterpret_cast<Floats>(parts[2 * i]), b = reinterpret_cast<Floats>(parts[2 * i + 1]);
    two[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  const Floats a = two[0], b = two[1];
  return reinterpret_cast<Wide>(
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}

// Adds what is left of sixteen vectors: what `sum` gives for each.
Wide fold_rest(const Wide (&folded)[4]) {
  Floats two[2];
  for (long i = 0; i < 2; ++i) {
    const Floats a = reinterpret_cast<Floats>(folded[2 * i]), b = reinterpret_cast<Floats>(folded[2 * i + 1]);
    two[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
             __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  const Floats a = two[0], b = two[1];
  return reinterpret_cast<Wide>(
      __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
}

#else

// The same sums with half as wide registers.
Wide fold_four(const Wide (&parts)[4]) {
  __m256 own[4], two[2];
  for (long i = 0; i < 4; ++i) own[i] = _mm256_add_ps(parts[i].low, parts[i].high);
  for (long i = 0; i < 2; ++i)
    two[i] = _mm256_add_ps(_mm256_permute2f128_ps(own[2 * i], own[2 * i + 1], 0x20),
                           _mm256_permute2f128_ps(own[2 * i], own[2 * i + 1], 0x31));
  return {two[0], two[1]};
}

Wide fold_rest(const Wide (&folded)[4]) {
  __m256 two[4], one[2];
  for (long i = 0; i < 4; ++i)
    two[i] = _mm256_add_ps(_mm256_shuffle_ps(folded[i].low, folded[i].high, 0x44),
                           _mm256_shuffle_ps(folded[i].low, folded[i].high, 0xee));  // by rows 0 2 | 1 3
  for (long i = 0; i < 2; ++i) {
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0x88),
                                      _mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0xdd));  // 0 2 4 6 | 1 3 5 7
    one[i] = _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  return {one[0], one[1]};
}

#endif

// Writes the products of `NUM_ROWS` queries (padded with 0) and of sixteen keys: `count`, the last again and again.
template <long NUM_ROWS, class Element>
void multiply(const float (*queries)[MAX_DIM], const Element* keys, long count, long head_dim, Wide* products) {
  Wide folded[NUM_ROWS][4];
  for (long four = 0; four < 4; ++four) {
    const Element* from[4];
    for (long i = 0; i < 4; ++i) from[i] = keys + std::min(4 * four + i, count - 1) * head_dim;
    Wide sums[NUM_ROWS][4];
    for (long row = 0; row < NUM_ROWS; ++row)
      for (long i = 0; i < 4; ++i) sums[row][i] = zeros();
    const auto add = [&](long column, auto load_key) {
      Wide key[4];
      for (long i = 0; i < 4; ++i) key[i] = load_key(from[i] + column);
      for (long row = 0; row < NUM_ROWS; ++row) {
        const Wide query = load_wide(queries[row] + column);
        for (long i = 0; i < 4; ++i) sums[row][i] = add_product(sums[row][i], query, key[i]);
      }
    };
    const long rest = head_dim % LANES, whole = head_dim - rest;
    for (long column = 0; column < whole; column += LANES)
      add(column, [](const Element* key) { return load_wide(key); });
    if (rest) add(whole, [&](const Element* key) { return load_wide_some(key, rest); });
    for (long row = 0; row < NUM_ROWS; ++row) folded[row][four] = fold_four(sums[row]);
  }
  for (long row = 0; row < NUM_ROWS; ++row) products[row] = fold_rest(folded[row]);
}

// The same for any number of queries: `NUM_ROWS` at a time, and then fewer.
template <long NUM_ROWS, class Element>
void multiply_all(const float (*queries)[MAX_DIM], const Element* keys, long count, long head_dim, long num_rows,
                  Wide* products) {
  for (; num_rows >= NUM_ROWS; num_rows -= NUM_ROWS, queries += NUM_ROWS, products += NUM_ROWS)
    multiply<NUM_ROWS>(queries, keys, count, head_dim, products);
  if constexpr (NUM_ROWS > 1)
    multiply_all<NUM_ROWS / 2>(queries, keys, count, head_dim, num_rows, products);
}

typedef float Scores[PART + LANES];  // of one row, from the stretch's first position, and then a vector of -infinity

// Fills the scores of rows; `queries` are scaled. A vector that goes too far is overwritten by the next.
template <class Element>
void score(const Call& call, const Stretch& stretch, const Element* keys, const float (*queries)[MAX_DIM],
           const Rows& rows, Scores* scores) {
  long count;
  for (long position = stretch.first; position < stretch.stop; position += count) {
    count = std::min(LANES, stretch.tile_stop(position) - position);
    Wide products[ROWS];
    multiply_all<SCORED>(queries, keys + stretch.slot(position) * call.head_dim, count, call.head_dim, rows.count(),
                         products);
    for (long row = 0; row < rows.count(); ++row) {
      if (call.slopes) {
        float lanes[LANES];
        const long distance = stretch.distance - rows.token(row) + position;
        for (long i = 0; i < LANES; ++i) lanes[i] = static_cast<float>(distance + i);
        products[row] = add_product(products[row], all(call.slopes[rows.head(row)]), load_wide(lanes));
      }
      store_wide(scores[row] + position - stretch.first, products[row]);
    }
  }
  for (long row = 0; row < rows.count(); ++row) {
    const long stop = std::min(stretch.stop, stretch.own_stop + rows.token(row));
    store_wide(scores[row] + stop - stretch.first, all(-INFINITY));
    store_wide(scores[row] + stretch.stop - stretch.first, all(-INFINITY));
  }
}

// Replaces scores by their exponentials; returns the greatest score and the sum.
void exponentiate(float* scores, long count, float* greatest, float* total) {
  Floats greatest_lanes = broadcast(-INFINITY), sums = {};
  for (long i = 0; i < count; i += LANES) greatest_lanes = larger(load(scores + i), greatest_lanes);
  *greatest = largest(greatest_lanes);
  for (long i = 0; i < count; i += LANES) {
    const Floats weights = exponential(load(scores + i) - *greatest);
    store(scores + i, weights);
    sums += weights;
  }
  *total = sum(sums);
}

// Writes the weighted sums of `NUM_COLUMNS` vectors of the values, for `NUM_ROWS` rows, divided by `divisors`.
template <long NUM_ROWS, long NUM_COLUMNS, class Element>
void add_columns(const Call& call, const Stretch& stretch, const Element* values, const Scores* weights, long column,
                 const float* divisors, float* const* outs) {
  Wide sums[NUM_ROWS][NUM_COLUMNS];
  for (long row = 0; row < NUM_ROWS; ++row)
    for (long c = 0; c < NUM_COLUMNS; ++c) sums[row][c] = zeros();
  const long rest = call.head_dim - column;
  long stop;
  for (long position = stretch.first; position < stretch.stop; position = stop) {
    stop = stretch.tile_stop(position);
    const Element* value_row = values + stretch.slot(position) * call.head_dim;
    for (long i = position - stretch.first; i < stop - stretch.first; ++i, value_row += call.head_dim)
      for (long c = 0; c < NUM_COLUMNS; ++c) {
        const Element* from = value_row + column + c * LANES;
        const Wide value = NUM_COLUMNS > 1 ? load_wide(from) : load_wide_some(from, rest);
        for (long row = 0; row < NUM_ROWS; ++row)
          sums[row][c] = add_product(sums[row][c], all(weights[row][i]), value);
      }
  }
  for (long row = 0; row < NUM_ROWS; ++row)
    for (long c = 0; c < NUM_COLUMNS; ++c) {
      float own[LANES];
      store_wide(own, quotient(sums[row][c], divisors[row]));
      const long first = column + c * LANES;
      std::copy_n(own, std::min(LANES, call.head_dim - first), outs[row] + first);
    }
}

// Writes the weighted sums of values of `num_rows` rows, `NUM_ROWS` at a time and then fewer.
template <long NUM_ROWS, class Element>
void add_values(const Call& call, const Stretch& stretch, const Element* values, const Scores* weights, long num_rows,
                const float* divisors, float* const* outs) {
  for (; num_rows >= NUM_ROWS; num_rows -= NUM_ROWS) {
    long column = 0;
    for (; column + COLUMNS * LANES <= call.head_dim; column += COLUMNS * LANES)
      add_columns<NUM_ROWS, COLUMNS>(call, stretch, values, weights, column, divisors, outs);
    for (; column < call.head_dim; column += LANES)
      add_columns<NUM_ROWS, 1>(call, stretch, values, weights, column, divisors, outs);
    weights += NUM_ROWS, divisors += NUM_ROWS, outs += NUM_ROWS;
  }
  if constexpr (NUM_ROWS > 1)
    add_values<NUM_ROWS / 2>(call, stretch, values, weights, num_rows, divisors, outs);
}

// Attends with rows, whose heads share keys and values, to a part.
template <class Element>
void attend(const Call& call, const Tokens& tokens, long part, const Stretch& stretch, const Element* keys,
            const Element* values, const Rows& rows) {
  alignas(64) float queries[ROWS][MAX_DIM];
  alignas(64) Scores scores[ROWS];
  for (long row = 0; row < rows.count(); ++row) {
    const float* query =
        call.query + (tokens.row + rows.token(row)) * call.query_token_stride + rows.head(row) * call.query_head_stride;
    for (long column = 0; column < call.head_dim; column += LANES)
      store(queries[row] + column, load_some(query + column, call.head_dim - column) * call.scale);
  }
  score(call, stretch, keys, queries, rows, scores);
  float divisors[ROWS];
  float* outs[ROWS];
  for (long row = 0; row < rows.count(); ++row) {
    float greatest, total;
    exponentiate(scores[row], stretch.stop - stretch.first, &greatest, &total);
    if (tokens.num_parts > 1) {
      const long partial = tokens.first_partial + part * tokens.count + rows.token(row);
      const long place = partial * call.num_heads + rows.head(row);
      call.ends()[2 * place] = greatest, call.ends()[2 * place + 1] = total;
      divisors[row] = 1.0f, outs[row] = call.partials + place * call.head_dim;
    } else {
      const long place = (tokens.row + rows.token(row)) * call.num_heads + rows.head(row);
      divisors[row] = total, outs[row] = call.out + place * call.head_dim;
    }
  }
  add_values<SUMMED>(call, stretch, values, scores, rows.count(), divisors, outs);
}

// Attends with all heads of a KV head to a part.
template <class Element>
void attend_part(const Call& call, const Element* keys, const Element* values, long index, long kv_head) {
  const Tokens& tokens = call.tokens[call.parts[index][0]];
  const long part = call.parts[index][1], skipped = part * PART;
  const long start = tokens.first_visible / TILE * TILE + skipped, seen = tokens.position + 1 - start;
  const Stretch stretch = {call.tiles + tokens.first_tile + skipped / TILE, std::max(0L, tokens.first_visible - start),
                           std::min(PART, seen + tokens.count - 1), std::min(PART, seen), start - tokens.position};
  const long own = kv_head * call.num_slots * call.head_dim;
  const long group = call.num_heads / call.num_kv_heads;
  for (long head = 0; head < group; head += ROWS)
    attend(call, tokens, part, stretch, keys + own, values + own,
           Rows{tokens.count, kv_head * group + head, std::min(ROWS, group - head)});
}

// Puts the parts of one head of a token together.
void join_parts(const Call& call, const Tokens& tokens, long token, long head) {
  const auto place = [&](long part) {
    return (tokens.first_partial + part * tokens.count + token) * call.num_heads + head;
  };
  float greatest = -INFINITY;
  for (long part = 0; part < tokens.num_parts; ++part) {
    const float own = call.ends()[2 * place(part)];
    greatest = own > greatest ? own : greatest;
  }
  float total = 0.0f;
  float sums[MAX_DIM] = {};
  for (long part = 0; part < tokens.num_parts; ++part) {
    const float* end = call.ends() + 2 * place(part);
    const float weight = exponential(broadcast(end[0] - greatest))[0];
    total += weight * end[1];
    for (long i = 0; i < call.head_dim; ++i) sums[i] += weight * call.partials[place(part) * call.head_dim + i];
  }
  float* out = call.out + ((tokens.row + token) * call.num_heads + head) * call.head_dim;
  for (long i = 0; i < call.head_dim; ++i) out[i] = sums[i] / total;
}

template <class Element>
void attend_all(const Call& call, const void* keys, const void* values, long num_threads) {
  const long num_tasks = call.num_parts * call.num_kv_heads;
  std::atomic<long> next{0};
  on_threads(std::min(num_threads, num_tasks), [&](long, long) {
    for (long task; (task = next.fetch_add(1)) < num_tasks;)
      attend_part(call, static_cast<const Element*>(keys), static_cast<const Element*>(values),
                  task % call.num_parts, task / call.num_parts);
  });
}

}  // namespace
}  // namespace spanwise

// Attends with tokens; `element` is what keys and values are: 0 fp32, 1 bf16, 2 fp16. See Call.
extern "C" void spanwise_attention(float* out, const float* query, int64_t query_token_stride,
                                   int64_t query_head_stride, const void* keys, const void* values, int64_t element,
                                   int64_t num_slots, const int64_t* tokens, int64_t num_tokens, const int64_t* parts,
                                   int64_t num_parts, const int64_t* tiles, float* partials, int64_t num_partials,
                                   int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
                                   const float* slopes, int64_t num_threads) {
  using namespace spanwise;
  const Call call = {out,       query,    query_token_stride, query_head_stride, num_slots,
                     reinterpret_cast<const Tokens*>(tokens), reinterpret_cast<const int64_t(*)[2]>(parts),
                     tiles,     partials, num_parts,          num_partials,      num_heads,
                     num_kv_heads, head_dim, scale, slopes};
  const auto attend = element == 0 ? attend_all<float> : element == 1 ? attend_all<BFloat16> : attend_all<Float16>;
  attend(call, keys, values, num_threads);
  if (!num_partials) return;
  in_shares(num_threads, num_tokens * num_heads, 1, [&](long first, long stop) {
    for (long i = first; i < stop; ++i) {
      const Tokens& own = call.tokens[i / num_heads];
      for (long token = 0; own.num_parts > 1 && token < own.count; ++token)
        join_parts(call, own, token, i % num_heads);
    }
  });
}
