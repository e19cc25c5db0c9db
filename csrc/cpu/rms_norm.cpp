// rms_norm: x / rms(x) * weight of each row, and its gradients, each in one pass. The gradient of the weight is summed
// over fixed blocks of rows, in order, so that the number of threads changes no bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "ops.h"
#include "vector_level.h"

namespace mrl {
namespace {

constexpr int64_t kBlock = 256;  // rows whose weight gradients are summed on their own

MRL_INLINE void forward_row(const float* x, const float* weight, float* out, float* inverse, int64_t cols, float eps) {
  const float scale = 1.0f / std::sqrt(dot(x, x, cols) / static_cast<float>(cols) + eps);
  for (int64_t j = 0; j < cols; ++j) out[j] = x[j] * scale * weight[j];
  *inverse = scale;
}

// With n = x * inverse and g = grad_out * weight: grad = inverse * (g - n * mean(g * n)), grad_weight += grad_out * n.
MRL_INLINE void backward_row(const float* x, const float* weight, const float* grad_out, float inverse, float* grad,
                             float* grad_weight, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    grad[j] = grad_out[j] * weight[j];
    grad_weight[j] += grad_out[j] * (x[j] * inverse);
  }
  const float mean = dot(grad, x, cols) * inverse / static_cast<float>(cols);
  for (int64_t j = 0; j < cols; ++j) grad[j] = inverse * (grad[j] - x[j] * inverse * mean);
}

using Forward = void (*)(const float*, const float*, float*, float*, int64_t, float);
void forward_plain(const float* x, const float* w, float* o, float* i, int64_t n, float e) {
  forward_row(x, w, o, i, n, e);
}
MRL_AVX2 void forward_avx2(const float* x, const float* w, float* o, float* i, int64_t n, float e) {
  forward_row(x, w, o, i, n, e);
}
MRL_AVX512 void forward_avx512(const float* x, const float* w, float* o, float* i, int64_t n, float e) {
  forward_row(x, w, o, i, n, e);
}

using Backward = void (*)(const float*, const float*, const float*, float, float*, float*, int64_t);
void backward_plain(const float* x, const float* w, const float* g, float i, float* o, float* ow, int64_t n) {
  backward_row(x, w, g, i, o, ow, n);
}
MRL_AVX2 void backward_avx2(const float* x, const float* w, const float* g, float i, float* o, float* ow, int64_t n) {
  backward_row(x, w, g, i, o, ow, n);
}
MRL_AVX512 void backward_avx512(const float* x, const float* w, const float* g, float i, float* o, float* ow,
                                int64_t n) {
  backward_row(x, w, g, i, o, ow, n);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* out, float* inverse, int64_t rows, int64_t cols, float eps,
              int num_threads) {
  const Forward run = level() == Level::avx512 ? forward_avx512 : level() == Level::avx2 ? forward_avx2 : forward_plain;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < rows; ++row) run(x + row * cols, weight, out + row * cols, inverse + row, cols, eps);
}

void rms_norm_grad(const float* x, const float* weight, const float* inverse, const float* grad_out, float* grad,
                   float* grad_weight, int64_t rows, int64_t cols, int num_threads) {
  const Backward run =
      level() == Level::avx512 ? backward_avx512 : level() == Level::avx2 ? backward_avx2 : backward_plain;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> sums(blocks * cols, 0.0f);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t row = block * kBlock; row < std::min(rows, (block + 1) * kBlock); ++row)
      run(x + row * cols, weight, grad_out + row * cols, inverse[row], grad + row * cols, sums.data() + block * cols,
          cols);
  std::fill_n(grad_weight, cols, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < cols; ++j) grad_weight[j] += sums[block * cols + j];
}

}  // namespace mrl
