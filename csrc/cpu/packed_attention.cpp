// packed_attention: causal attention of sequences that lie end to end, with rotary positions, forward and backward.
// One task is one segment and one key head: its keys are packed as columns once, four queries at a time go over them,
// and no score outlives its four rows, so memory grows with the longest segment and not with its square. Sums have one
// fixed order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "ops.h"
#include "vector_level.h"
#include "wide.h"

namespace mrl {
namespace {

constexpr int64_t kRows = 4;   // queries that share one pass over the keys
constexpr int64_t kKeys = kWide;  // keys of one vector
MRL_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

MRL_INLINE Wide indices(int64_t first) {
  const Wide counting = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return counting + static_cast<float>(first);
}

// Buffers of one thread; sized by the longest segment.
struct Workspace {
  std::vector<float> keys_by_dim, values_by_dim, rows_of_keys, scores, grad_keys, grad_values;
  float queries[kRows * kMaxHeadDim], grads[kRows * kMaxHeadDim], sums[kRows * kMaxHeadDim];
};

// [count, dim] with a token stride -> [count, padded_dim], zeros behind `dim`.
MRL_INLINE void rows(const float* from, int64_t stride, int64_t count, int64_t dim, int64_t padded_dim, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < dim; ++d) to[j * padded_dim + d] = from[j * stride + d];
    for (int64_t d = dim; d < padded_dim; ++d) to[j * padded_dim + d] = 0.0f;
  }
}

// Rotates one head of a token at `position` (Su et al. 2021, arXiv:2104.09864), channel i with i + half; -1: the
// transpose, which takes gradients back.
MRL_INLINE void rotate(const Rotary& rotary, int64_t position, float direction, float* x) {
  const int64_t half = rotary.half;
  const float* const cos = rotary.cos + position * half;
  const float* const sin = rotary.sin + position * half;
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half], s = sin[d] * direction;
    x[d] = a * cos[d] - b * s;
    x[d + half] = b * cos[d] + a * s;
  }
}

// The keys of a segment and group, rotated: [num_keys, padded dim].
MRL_INLINE void keys_in_rows(const PackedAttention& a, const AttentionSegment& at, int64_t group, float* to) {
  const int64_t padded_dim = round_up(a.dim, kLanes);
  rows(a.key.at(at.first_key, group), a.key.token, at.num_keys, a.dim, padded_dim, to);
  if (a.rotary.cos != nullptr)
    for (int64_t j = 0; j < at.num_keys; ++j) rotate(a.rotary, j, 1.0f, to + j * padded_dim);
}

// [count, dim] with a token stride -> [dim, padded], zeros behind `count`.
MRL_INLINE void columns(const float* from, int64_t stride, int64_t count, int64_t dim, int64_t padded, float* to) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t d = 0; d < dim; ++d) to[d * padded + j] = from[j * stride + d];
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t j = count; j < padded; ++j) to[d * padded + j] = 0.0f;
}

// acc[r] = sum over d of left[r][d] * by_dim[d][j .. j + 16).
MRL_INLINE void products(const float* left, const float* by_dim, int64_t dim, int64_t padded, Wide* acc) {
  for (int64_t r = 0; r < kRows; ++r) acc[r] = Wide{};
  for (int64_t d = 0; d < dim; ++d) {
    const Wide column = load_wide(by_dim + d * padded);
    for (int64_t r = 0; r < kRows; ++r) acc[r] += left[r * kMaxHeadDim + d] * column;
  }
}

// by_dim[d][j .. j + 16) += sum over r of left[r][d] * weights[r].
MRL_INLINE void add_outer(const float* left, const Wide* weights, int64_t dim, int64_t padded, float* by_dim) {
  for (int64_t d = 0; d < dim; ++d) {
    Wide sum = load_wide(by_dim + d * padded);
    for (int64_t r = 0; r < kRows; ++r) sum += left[r * kMaxHeadDim + d] * weights[r];
    store_wide(by_dim + d * padded, sum);
  }
}

// sums[r][d] = sum over j of weights[r][j] * table[j][d].
MRL_INLINE void weighted_sums(const float* weights, int64_t stride, const float* table, int64_t count,
                              int64_t padded_dim, float* sums) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    Lanes even[kRows] = {}, odd[kRows] = {};
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const Lanes first = load_lanes(table + j * padded_dim + d), second = load_lanes(table + (j + 1) * padded_dim + d);
      for (int64_t r = 0; r < kRows; ++r) {
        even[r] += weights[r * stride + j] * first;
        odd[r] += weights[r * stride + j + 1] * second;
      }
    }
    if (j < count) {
      const Lanes last = load_lanes(table + j * padded_dim + d);
      for (int64_t r = 0; r < kRows; ++r) even[r] += weights[r * stride + j] * last;
    }
    for (int64_t r = 0; r < kRows; ++r) store_lanes(sums + r * kMaxHeadDim + d, even[r] + odd[r]);
  }
}

// x where keys j .. j + 16 lie in [first, last), else `hidden`.
MRL_INLINE Wide within(Wide x, int64_t j, int64_t first, int64_t last, float hidden) {
  if (j + kKeys > last) x = indices(j) < static_cast<float>(last) ? x : Wide{} + hidden;
  if (j < first) x = indices(j) < static_cast<float>(first) ? Wide{} + hidden : x;
  return x;
}

// In place: products with keys [start, count) to unnormalised probabilities, 0 before the window; returns their sum and
// their maximum, the sink counted in both. `start` is a multiple of kKeys.
MRL_INLINE float softmax_row(float* scores, int64_t start, int64_t count, const ScoreRule& rule, int64_t head,
                             float* maximum) {
  const int64_t padded = round_up(count, kKeys), first = rule.first(count);
  Wide tops = Wide{} - INFINITY, total = {};
  for (int64_t j = start; j < padded; j += kKeys) {
    Wide x = load_wide(scores + j) * rule.scale;
    if (rule.softcap > 0.0f) x = tanh_wide(x / rule.softcap) * rule.softcap;
    x = within(x, j, first, count, -INFINITY);
    store_wide(scores + j, x);
    tops = x > tops ? x : tops;
  }
  float top = tops[0];
  for (int64_t lane = 1; lane < kKeys; ++lane) top = tops[lane] > top ? tops[lane] : top;
  if (rule.sinks != nullptr && rule.sinks[head] > top) top = rule.sinks[head];
  for (int64_t j = start; j < padded; j += kKeys) {
    const Wide p = exp_wide(load_wide(scores + j) - top);
    store_wide(scores + j, p);
    total += p;
  }
  float sum = rule.sinks == nullptr ? 0.0f : exp_wide(Wide{} + (rule.sinks[head] - top))[0];
  for (int64_t lane = 0; lane < kKeys; ++lane) sum += total[lane];
  *maximum = top;
  return sum;
}

// Four queries from the i-th of a segment, rotated; those that do not exist are 0.
MRL_INLINE void load_queries(const PackedAttention& a, const AttentionSegment& at, int64_t i, int64_t head,
                             float* to) {
  for (int64_t r = 0; r < kRows; ++r) {
    float* const row = to + r * kMaxHeadDim;
    if (i + r >= at.num_queries) {
      std::fill_n(row, a.dim, 0.0f);
      continue;
    }
    std::copy_n(a.query.at(at.first_query + i + r, head), a.dim, row);
    if (a.rotary.cos != nullptr) rotate(a.rotary, at.num_keys - at.num_queries + i + r, 1.0f, row);
  }
}

MRL_INLINE void forward_task(const PackedAttention& a, int64_t segment, int64_t group, Workspace& w) {
  const AttentionSegment at = a.segments[segment];
  const int64_t padded = round_up(at.num_keys, kKeys), value_width = round_up(a.value_dim, kLanes);
  keys_in_rows(a, at, group, w.rows_of_keys.data());
  columns(w.rows_of_keys.data(), round_up(a.dim, kLanes), at.num_keys, a.dim, padded, w.keys_by_dim.data());
  rows(a.value.at(at.first_key, group), a.value.token, at.num_keys, a.value_dim, value_width, w.rows_of_keys.data());
  const int64_t per_group = a.heads / a.groups, before = at.num_keys - at.num_queries;
  for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
    for (int64_t i = 0; i < at.num_queries; i += kRows) {
      const int64_t here = std::min(kRows, at.num_queries - i), count = before + i + here;
      const int64_t start = a.rule.first(before + i + 1) / kKeys * kKeys;
      load_queries(a, at, i, head, w.queries);
      for (int64_t j = start; j < count; j += kKeys) {
        Wide scores[kRows];
        products(w.queries, w.keys_by_dim.data() + j, a.dim, padded, scores);
        for (int64_t r = 0; r < kRows; ++r) store_wide(w.scores.data() + r * padded + j, scores[r]);
      }
      float total[kRows], maximum[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t seen = before + i + std::min(r, here - 1) + 1;
        total[r] = softmax_row(w.scores.data() + r * padded, start, seen, a.rule, head, maximum + r);
        for (int64_t j = round_up(seen, kKeys); j < count; ++j) w.scores[r * padded + j] = 0.0f;
      }
      weighted_sums(w.scores.data() + start, padded, w.rows_of_keys.data() + start * value_width, count - start,
                    value_width, w.sums);
      for (int64_t r = 0; r < here; ++r) {
        const int64_t row = (at.first_query + i + r) * a.heads + head;
        const float inverse = 1.0f / total[r];
        for (int64_t d = 0; d < a.value_dim; ++d) a.out[row * a.value_dim + d] = w.sums[r * kMaxHeadDim + d] * inverse;
        a.maximum[row] = maximum[r];
        a.inverse[row] = inverse;
      }
    }
  }
}

// Queries and output gradients of four rows, and what their softmax needs; rows that do not exist have probability 0.
MRL_INLINE void load_rows(const PackedAttentionGrad& g, const AttentionSegment& at, int64_t i, int64_t head,
                          Workspace& w, float* maximum, float* inverse, float* delta) {
  const PackedAttention& a = g.forward;
  load_queries(a, at, i, head, w.queries);
  for (int64_t r = 0; r < kRows; ++r) {
    const bool exists = i + r < at.num_queries;
    const int64_t token = at.first_query + std::min(i + r, at.num_queries - 1), row = token * a.heads + head;
    const float* grad = g.grad_out + row * a.value_dim;
    for (int64_t d = 0; d < a.value_dim; ++d) w.grads[r * kMaxHeadDim + d] = exists ? grad[d] : 0.0f;
    maximum[r] = exists ? a.maximum[row] : 0.0f;  // exp(0 - maximum) could overflow, and infinity times 0 is NaN
    inverse[r] = exists ? a.inverse[row] : 0.0f;
    delta[r] = dot(grad, a.out + row * a.value_dim, a.value_dim);
  }
}

MRL_INLINE void backward_rows(const PackedAttentionGrad& g, const AttentionSegment& at, int64_t i, int64_t head,
                              int64_t padded, Workspace& w) {
  const PackedAttention& a = g.forward;
  float maximum[kRows], inverse[kRows], delta[kRows];
  load_rows(g, at, i, head, w, maximum, inverse, delta);
  const int64_t seen = at.num_keys - at.num_queries + i + 1;  // keys up to the first row's own
  const int64_t count = std::min(seen + kRows - 1, at.num_keys), start = a.rule.first(seen) / kKeys * kKeys;
  const int64_t width = round_up(a.dim, kLanes);
  for (int64_t j = start; j < count; j += kKeys) {
    Wide p[kRows], grad[kRows];
    products(w.queries, w.keys_by_dim.data() + j, a.dim, padded, p);
    products(w.grads, w.values_by_dim.data() + j, a.value_dim, padded, grad);
    for (int64_t r = 0; r < kRows; ++r) {
      Wide score = p[r] * a.rule.scale, slope = Wide{} + a.rule.scale;
      if (a.rule.softcap > 0.0f) {
        const Wide bent = tanh_wide(score / a.rule.softcap);
        score = bent * a.rule.softcap;
        slope *= 1.0f - bent * bent;
      }
      p[r] = within(exp_wide(score - maximum[r]) * inverse[r], j, a.rule.first(seen + r), seen + r, 0.0f);
      grad[r] = p[r] * (grad[r] - delta[r]) * slope;
      store_wide(w.scores.data() + r * padded + j, grad[r]);
    }
    add_outer(w.grads, p, a.value_dim, padded, w.grad_values.data() + j);
    add_outer(w.queries, grad, a.dim, padded, w.grad_keys.data() + j);
  }
  weighted_sums(w.scores.data() + start, padded, w.rows_of_keys.data() + start * width, count - start, width, w.sums);
  for (int64_t r = 0; r < std::min(kRows, at.num_queries - i); ++r) {
    float* const sums = w.sums + r * kMaxHeadDim;
    if (a.rotary.cos != nullptr) rotate(a.rotary, at.num_keys - at.num_queries + i + r, -1.0f, sums);
    std::copy_n(sums, a.dim, g.grad_query + ((at.first_query + i + r) * a.heads + head) * a.dim);
  }
}

// Segments may share keys (context parallelism), so one task has all segments of a key head.
MRL_INLINE void backward_task(const PackedAttentionGrad& g, int64_t segment, int64_t group, Workspace& w) {
  const PackedAttention& a = g.forward;
  const AttentionSegment at = a.segments[segment];
  const int64_t padded = round_up(at.num_keys, kKeys), per_group = a.heads / a.groups;
  keys_in_rows(a, at, group, w.rows_of_keys.data());
  columns(w.rows_of_keys.data(), round_up(a.dim, kLanes), at.num_keys, a.dim, padded, w.keys_by_dim.data());
  columns(a.value.at(at.first_key, group), a.value.token, at.num_keys, a.value_dim, padded, w.values_by_dim.data());
  std::fill_n(w.grad_keys.data(), a.dim * padded, 0.0f);
  std::fill_n(w.grad_values.data(), a.value_dim * padded, 0.0f);
  for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head)
    for (int64_t i = 0; i < at.num_queries; i += kRows) backward_rows(g, at, i, head, padded, w);
  for (int64_t j = 0; j < at.num_keys; ++j) {
    const int64_t row = (at.first_key + j) * a.groups + group;
    for (int64_t d = 0; d < a.dim; ++d) w.sums[d] = w.grad_keys[d * padded + j];
    if (a.rotary.cos != nullptr) rotate(a.rotary, j, -1.0f, w.sums);
    for (int64_t d = 0; d < a.dim; ++d) g.grad_key[row * a.dim + d] += w.sums[d];
    for (int64_t d = 0; d < a.value_dim; ++d) g.grad_value[row * a.value_dim + d] += w.grad_values[d * padded + j];
  }
}

using Forward = void (*)(const PackedAttention&, int64_t, int64_t, Workspace&);
void forward_plain(const PackedAttention& a, int64_t s, int64_t g, Workspace& w) { forward_task(a, s, g, w); }
MRL_AVX2 void forward_avx2(const PackedAttention& a, int64_t s, int64_t g, Workspace& w) { forward_task(a, s, g, w); }
MRL_AVX512 void forward_avx512(const PackedAttention& a, int64_t s, int64_t g, Workspace& w) {
  forward_task(a, s, g, w);
}

using Backward = void (*)(const PackedAttentionGrad&, int64_t, int64_t, Workspace&);
void backward_plain(const PackedAttentionGrad& a, int64_t s, int64_t g, Workspace& w) { backward_task(a, s, g, w); }
MRL_AVX2 void backward_avx2(const PackedAttentionGrad& a, int64_t s, int64_t g, Workspace& w) {
  backward_task(a, s, g, w);
}
MRL_AVX512 void backward_avx512(const PackedAttentionGrad& a, int64_t s, int64_t g, Workspace& w) {
  backward_task(a, s, g, w);
}

Workspace workspace(const PackedAttention& a, bool backward) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.num_segments; ++s) longest = std::max(longest, a.segments[s].num_keys);
  const size_t keys = round_up(longest, kKeys), widest = round_up(std::max(a.dim, a.value_dim), kLanes);
  Workspace w;
  for (auto* buffer : {&w.keys_by_dim, &w.rows_of_keys}) buffer->resize(keys * widest);
  if (backward)
    for (auto* buffer : {&w.values_by_dim, &w.grad_keys, &w.grad_values}) buffer->resize(keys * widest);
  w.scores.resize(keys * kRows);
  return w;
}

}  // namespace

void packed_attention(const PackedAttention& a, int num_threads) {
  const Forward run = level() == Level::avx512 ? forward_avx512 : level() == Level::avx2 ? forward_avx2 : forward_plain;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Workspace w = workspace(a, false);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < a.num_segments * a.groups; ++task) run(a, task / a.groups, task % a.groups, w);
  }
}

void packed_attention_grad(const PackedAttentionGrad& g, int num_threads) {
  const Backward run =
      level() == Level::avx512 ? backward_avx512 : level() == Level::avx2 ? backward_avx2 : backward_plain;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Workspace w = workspace(g.forward, true);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < g.forward.groups; ++group)
      for (int64_t segment = 0; segment < g.forward.num_segments; ++segment) run(g, segment, group, w);
  }
}

}  // namespace mrl
