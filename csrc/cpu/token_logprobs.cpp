// token_logprobs: what happens to a tile of logits between the matrix products, in one pass each way.
//
// A row is worked on in blocks that stay in the first-level cache: converted to float32 and divided by the temperature,
// folded into the row's online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) or turned into its gradient.
#include "numbers.h"
#include "ops.h"
#include "vector_level.h"
#include "wide.h"

namespace mrl {
namespace {

constexpr int64_t kBlock = 512;  // logits of a block; a whole number of vectors
constexpr float kNothing = -1e30f;  // below every logit, and finite: exp(kNothing - maximum) is 0

// One block as float32, and kNothing up to a whole number of vectors.
template <class T>
MRL_INLINE int64_t load_block(const T* x, int64_t n, float divisor, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Cast<float>::from(x[i]);
  if (divisor != 1.0f)
    for (int64_t i = 0; i < n; ++i) out[i] /= divisor;
  const int64_t padded = (n + kWide - 1) / kWide * kWide;
  for (int64_t i = n; i < padded; ++i) out[i] = kNothing;
  return padded;
}

MRL_INLINE float sum_wide(Wide x) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kWide; ++i) sum += x[i];
  return sum;
}

// -inf as kNothing, so that 0 log 0 is 0; NaN stays.
MRL_INLINE Wide finite(Wide x) {
  const Wide low = Wide{} + kNothing;
  return x < low ? low : x;
}

MRL_INLINE float exp_one(float x) { return exp_wide(Wide{} + x)[0]; }

template <class T>
MRL_INLINE void fold_row(const LogitTile& a, int64_t row) {
  alignas(64) float block[kBlock];
  const T* logits = static_cast<const T*>(a.logits) + row * a.width;
  float maximum = a.maximum[row], total = a.total[row], moment = a.moment[row];
  const int64_t target = a.targets[row] - a.first_row;
  for (int64_t start = 0; start < a.width; start += kBlock) {
    const int64_t n = a.width - start < kBlock ? a.width - start : kBlock;
    const int64_t padded = load_block(logits + start, n, a.temperature, block);
    if (target >= start && target < start + n) a.target[row] = block[target - start];
    Wide top = Wide{} + maximum;
    for (int64_t i = 0; i < padded; i += kWide) {
      const Wide x = load_wide(block + i);
      top = x > top ? x : top;
    }
    float larger = maximum;
    for (int64_t i = 0; i < kWide; ++i) larger = top[i] > larger ? top[i] : larger;
    Wide sums = {}, moments = {};
    for (int64_t i = 0; i < padded; i += kWide) {
      const Wide shifted = load_wide(block + i) - larger;
      const Wide p = exp_wide(shifted);
      sums += p;
      if (a.with_entropy) moments += p * finite(shifted);
    }
    const float shift = maximum - larger, scale = exp_one(shift);
    moment = (moment + total * shift) * scale + sum_wide(moments);
    total = total * scale + sum_wide(sums);
    maximum = larger;
  }
  a.maximum[row] = maximum, a.total[row] = total, a.moment[row] = moment;
}

template <class T>
MRL_INLINE void gradient_row(const LogitTile& a, const LogitGradient& g, int64_t row) {
  alignas(64) float block[kBlock];
  T* logits = static_cast<T*>(a.logits) + row * a.width;
  const float maximum = a.maximum[row], log_total = g.log_total[row];
  const float outer = g.grad_logprob[row] / a.temperature;
  const float slope = g.grad_entropy ? g.grad_entropy[row] / a.temperature : 0.0f;
  const float constant = g.grad_entropy ? outer + slope * g.entropy[row] : outer;
  const int64_t target = a.targets[row] - a.first_row;
  for (int64_t start = 0; start < a.width; start += kBlock) {
    const int64_t n = a.width - start < kBlock ? a.width - start : kBlock;
    const int64_t padded = load_block(logits + start, n, a.temperature, block);
    for (int64_t i = 0; i < padded; i += kWide) {
      const Wide log_p = finite(load_wide(block + i) - maximum - log_total);
      // d logprob / d logit = -p, and 1 more at the target; d entropy / d logit = -p (log p + entropy)
      store_wide(block + i, -(slope * log_p + constant) * exp_wide(log_p));
    }
    if (target >= start && target < start + n) block[target - start] += outer;
    for (int64_t i = 0; i < n; ++i) logits[start + i] = Cast<T>::from(block[i]);
  }
}

template <class T>
void fold_plain(const LogitTile& a, int64_t row) { fold_row<T>(a, row); }
template <class T>
MRL_AVX2 void fold_avx2(const LogitTile& a, int64_t row) { fold_row<T>(a, row); }
template <class T>
MRL_AVX512 void fold_avx512(const LogitTile& a, int64_t row) { fold_row<T>(a, row); }

template <class T>
void gradient_plain(const LogitTile& a, const LogitGradient& g, int64_t row) { gradient_row<T>(a, g, row); }
template <class T>
MRL_AVX2 void gradient_avx2(const LogitTile& a, const LogitGradient& g, int64_t row) { gradient_row<T>(a, g, row); }
template <class T>
MRL_AVX512 void gradient_avx512(const LogitTile& a, const LogitGradient& g, int64_t row) { gradient_row<T>(a, g, row); }

template <class T>
void fold(const LogitTile& a, int64_t tokens, int num_threads) {
  const auto run = level() == Level::avx512 ? fold_avx512<T> : level() == Level::avx2 ? fold_avx2<T> : fold_plain<T>;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < tokens; ++row) run(a, row);
}

template <class T>
void gradient(const LogitTile& a, const LogitGradient& g, int64_t tokens, int num_threads) {
  const auto run = level() == Level::avx512 ? gradient_avx512<T>
                   : level() == Level::avx2 ? gradient_avx2<T>
                                            : gradient_plain<T>;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < tokens; ++row) run(a, g, row);
}

}  // namespace

void fold_logits(const LogitTile& a, int64_t tokens, int type, int num_threads) {
  const auto run = type == kBfloat16 ? fold<Bf16> : type == kFloat16 ? fold<F16> : fold<float>;
  run(a, tokens, num_threads);
}

void grad_logits(const LogitTile& a, const LogitGradient& g, int64_t tokens, int type, int num_threads) {
  const auto run = type == kBfloat16 ? gradient<Bf16> : type == kFloat16 ? gradient<F16> : gradient<float>;
  run(a, g, tokens, num_threads);
}

}  // namespace mrl
