// decode_attention: one new token per sequence. Each (sequence, key head) is one task: rotate its queries and key by
// their position, put key and value into the cache, and attend to this sequence's part of the cache.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "ops.h"
#include "vector_level.h"

namespace mrl {
namespace {

MRL_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t rotary_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    x[d] = a * cos[d] + b * sin[d];
    x[d + half] = b * cos[d + half] + a * sin[d + half];
  }
}

// exp(x) for x <= 0, to 2 units in the last place (Cephes expf); 0 far below.
MRL_INLINE float exp_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = std::floor(clamped * 1.44269504088896341f + 0.5f);
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

// In place over `count` scores, and a sink where there is one; the array has room for whole lanes. A NaN anywhere gives
// NaN everywhere.
MRL_INLINE void softmax(float* scores, int64_t count, const float* sink) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  float largest = sink == nullptr ? scores[0] : *sink;
  Lanes tops = load_lanes(scores), check = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Lanes x = load_lanes(scores + i);
    tops = x > tops ? x : tops;
  }
  for (int64_t i = 0; i < kLanes; ++i) largest = tops[i] > largest ? tops[i] : largest;
  for (int64_t i = 0; i < padded; ++i) scores[i] = scores[i] == scores[i] ? exp_negative(scores[i] - largest) : NAN;
  for (int64_t i = count; i < padded; ++i) scores[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += kLanes) check += load_lanes(scores + i);
  const float scale = 1.0f / (sum_lanes(check) + (sink == nullptr ? 0.0f : exp_negative(*sink - largest)));
  for (int64_t i = 0; i < padded; ++i) scores[i] *= scale;
}

// out[d] = sum over positions of weights[position] * values[position][d].
MRL_INLINE void weighted_sum(const float* weights, const float* values, float* out, int64_t count, int64_t head_dim) {
  const int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even += weights[i] * load_lanes(values + i * head_dim + d);
      odd += weights[i + 1] * load_lanes(values + (i + 1) * head_dim + d);
    }
    if (i < count) even += weights[i] * load_lanes(values + i * head_dim + d);
    store_lanes(out + d, even + odd);
  }
  for (int64_t d = whole; d < head_dim; ++d) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * values[i * head_dim + d];
    out[d] = sum;
  }
}

MRL_INLINE void attend(const DecodeAttention& a, int64_t task, float* scores) {
  const int64_t row = task / a.kv_heads, head = task % a.kv_heads, dim = a.head_dim;
  const int64_t group = a.q_heads / a.kv_heads, position = a.positions[row];
  const int64_t first = a.rule.first(position + 1), count = position + 1 - first;
  float* const token = a.qkv + row * (a.q_heads + 2 * a.kv_heads) * dim;
  float* const queries = token + head * group * dim;
  float* const key = token + (a.q_heads + head) * dim;
  float* const keys = a.cache + task * 2 * a.length * dim;
  float* const values = keys + a.length * dim;
  const float* const cos = a.cos + row * a.rotary_dim;
  const float* const sin = a.sin + row * a.rotary_dim;
  for (int64_t g = 0; g < group; ++g) rotate(queries + g * dim, cos, sin, a.rotary_dim);
  rotate(key, cos, sin, a.rotary_dim);
  std::memcpy(keys + position * dim, key, dim * sizeof(float));
  std::memcpy(values + position * dim, key + a.kv_heads * dim, dim * sizeof(float));
  for (int64_t g = 0; g < group; ++g) {
    for (int64_t i = 0; i < count; ++i)
      scores[i] = dot(queries + g * dim, keys + (first + i) * dim, dim) * a.rule.scale;
    if (a.rule.softcap > 0.0f)
      for (int64_t i = 0; i < count; ++i) scores[i] = std::tanh(scores[i] / a.rule.softcap) * a.rule.softcap;
    softmax(scores, count, a.rule.sinks == nullptr ? nullptr : a.rule.sinks + head * group + g);
    weighted_sum(scores, values + first * dim, a.out + (row * a.q_heads + head * group + g) * dim, count, dim);
  }
}

using Attend = void (*)(const DecodeAttention&, int64_t, float*);
void attend_plain(const DecodeAttention& a, int64_t task, float* scores) { attend(a, task, scores); }
MRL_AVX2 void attend_avx2(const DecodeAttention& a, int64_t task, float* scores) { attend(a, task, scores); }
MRL_AVX512 void attend_avx512(const DecodeAttention& a, int64_t task, float* scores) { attend(a, task, scores); }

}  // namespace

void decode_attention(const DecodeAttention& a, int64_t rows, int num_threads) {
  const Attend run = level() == Level::avx512 ? attend_avx512 : level() == Level::avx2 ? attend_avx2 : attend_plain;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::vector<float> scores(a.length + kLanes);
#pragma omp for schedule(dynamic, 16)
    for (int64_t task = 0; task < rows * a.kv_heads; ++task) run(a, task, scores.data());
  }
}

}  // namespace mrl
