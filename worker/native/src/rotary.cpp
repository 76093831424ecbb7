// Rotary embeddings of a step's queries and keys, and the writing of keys and values to the cache: one pass over them.

#include <algorithm>

#include "elements.h"
#include "parallel.h"
#include "vector.h"

namespace spanwise {
namespace {

constexpr long MIN_ELEMENTS = 1L << 14;  // of a thread: fewer take less time than waking it

// Rows of heads: `[num_tokens, num_heads, head_dim]`, with strides.
struct Rows {
  const float* first;
  int64_t token_stride, head_stride;

  const float* at(long token, long head) const { return first + token * token_stride + head * head_stride; }
};

// Rotates the first `dim` elements by halves, (x, y) to (x cos - y sin, y cos + x sin), with the bits of transformers'
// `q * cos + rotate_half(q) * sin`; copies the others.
void rotate(const float* __restrict__ row, const float* __restrict__ cos, const float* __restrict__ sin, long dim,
            long head_dim, float* __restrict__ out) {
  const long half = dim / 2;
  for (long i = 0; i < half; ++i) {
    const float x = row[i], y = row[half + i];
    out[i] = x * cos[i] + -y * sin[i];
    out[half + i] = y * cos[half + i] + x * sin[half + i];
  }
  for (long i = dim; i < head_dim; ++i) out[i] = row[i];
}

template <class Element>
void write(Element* to, const float* row, long count) {
  for (long i = 0; i < count; ++i) narrow(to + i, row[i]);
}

struct Call {
  float* rotated;  // [num_tokens, num_heads, head_dim], or null where nothing is rotated
  Rows query, key, value;
  const float *cos, *sin;  // [num_tokens, rotary_dim]
  int64_t rotary_dim;
  const int64_t* slots;  // of the cache, by token
  int64_t num_slots;     // of the cache: keys and values are [num_kv_heads, num_slots, head_dim]
  int64_t num_heads, num_kv_heads, head_dim;
};

template <class Element>
void store_token(const Call& call, Element* keys, Element* values, long token) {
  const float *cos = call.cos + token * call.rotary_dim, *sin = call.sin + token * call.rotary_dim;
  for (long head = 0; call.rotated && head < call.num_heads; ++head)
    rotate(call.query.at(token, head), cos, sin, call.rotary_dim, call.head_dim,
           call.rotated + (token * call.num_heads + head) * call.head_dim);
  for (long head = 0; head < call.num_kv_heads; ++head) {
    const long place = (head * call.num_slots + call.slots[token]) * call.head_dim;
    const float* key = call.key.at(token, head);
    float turned[MAX_DIM];
    if (call.rotated) {
      rotate(key, cos, sin, call.rotary_dim, call.head_dim, turned);
      key = turned;
    }
    write(keys + place, key, call.head_dim);
    write(values + place, call.value.at(token, head), call.head_dim);
  }
}

template <class Element>
void store_all(const Call& call, void* keys, void* values, long num_tokens, long num_threads) {
  const long elements = (call.num_heads + 2 * call.num_kv_heads) * call.head_dim;
  in_shares(num_threads, num_tokens, std::max(1L, MIN_ELEMENTS / elements), [&](long first, long stop) {
    for (long token = first; token < stop; ++token)
      store_token(call, static_cast<Element*>(keys), static_cast<Element*>(values), token);
  });
}

}  // namespace
}  // namespace spanwise

// Writes keys and values to the cache, rotated ones if `rotated` is there to take the rotated queries. `element` is
// what the cache holds: 0 fp32, 1 bf16, 2 fp16. See Call.
extern "C" void spanwise_store_tokens(float* rotated, const float* query, int64_t query_token_stride,
                                      int64_t query_head_stride, const float* key, int64_t key_token_stride,
                                      int64_t key_head_stride, const float* value, int64_t value_token_stride,
                                      int64_t value_head_stride, const float* cos, const float* sin, int64_t rotary_dim,
                                      const int64_t* slots, void* keys, void* values, int64_t element,
                                      int64_t num_slots, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                                      int64_t head_dim, int64_t num_threads) {
  using namespace spanwise;
  const Call call = {rotated,
                     {query, query_token_stride, query_head_stride},
                     {key, key_token_stride, key_head_stride},
                     {value, value_token_stride, value_head_stride},
                     cos, sin, rotary_dim, slots, num_slots, num_heads, num_kv_heads, head_dim};
  const auto store = element == 0 ? store_all<float> : element == 1 ? store_all<BFloat16> : store_all<Float16>;
  store(call, keys, values, num_tokens, num_threads);
}
