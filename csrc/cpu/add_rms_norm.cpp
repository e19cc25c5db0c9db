// add_rms_norm: hidden += delta, and the norm of the sum, in one pass over each row.
#include <cmath>

#include "lanes.h"
#include "ops.h"
#include "vector_level.h"

namespace mrl {
namespace {

MRL_INLINE void norm_row(float* hidden, const float* delta, const float* weight, float* out, int64_t n, float eps) {
  for (int64_t i = 0; i < n; ++i) hidden[i] += delta[i];
  const float scale = 1.0f / std::sqrt(dot(hidden, hidden, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = hidden[i] * scale * weight[i];
}

using NormRow = void (*)(float*, const float*, const float*, float*, int64_t, float);
void norm_plain(float* h, const float* d, const float* w, float* o, int64_t n, float eps) {
  norm_row(h, d, w, o, n, eps);
}
MRL_AVX2 void norm_avx2(float* h, const float* d, const float* w, float* o, int64_t n, float eps) {
  norm_row(h, d, w, o, n, eps);
}
MRL_AVX512 void norm_avx512(float* h, const float* d, const float* w, float* o, int64_t n, float eps) {
  norm_row(h, d, w, o, n, eps);
}

}  // namespace

void add_rms_norm(float* hidden, const float* delta, const float* weight, float* out, int64_t rows, int64_t cols,
                  float eps, int num_threads) {
  const NormRow run = level() == Level::avx512 ? norm_avx512 : level() == Level::avx2 ? norm_avx2 : norm_plain;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    run(hidden + row * cols, delta + row * cols, weight, out + row * cols, cols, eps);
}

}  // namespace mrl
