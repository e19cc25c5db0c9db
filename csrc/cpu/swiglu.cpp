// swiglu: silu(gate) * up of rows [gate, up], and its gradient, each in one pass.
#include "ops.h"
#include "vector_level.h"
#include "wide.h"

namespace mrl {
namespace {

MRL_INLINE void forward_row(const float* x, float* out, int64_t width) {
  for (int64_t j = 0; j < width; j += kWide) {
    const Wide gate = load_wide(x + j, width - j), up = load_wide(x + width + j, width - j);
    store_wide(out + j, gate * sigmoid_wide(gate) * up, width - j);
  }
}

MRL_INLINE void backward_row(const float* x, const float* grad_out, float* grad, int64_t width) {
  for (int64_t j = 0; j < width; j += kWide) {
    const int64_t here = width - j;
    const Wide gate = load_wide(x + j, here), up = load_wide(x + width + j, here);
    const Wide outer = load_wide(grad_out + j, here);
    const Wide s = sigmoid_wide(gate);
    store_wide(grad + j, outer * up * (s * (1.0f + gate * (1.0f - s))), here);
    store_wide(grad + width + j, outer * (gate * s), here);
  }
}

using Forward = void (*)(const float*, float*, int64_t);
void forward_plain(const float* x, float* out, int64_t n) { forward_row(x, out, n); }
MRL_AVX2 void forward_avx2(const float* x, float* out, int64_t n) { forward_row(x, out, n); }
MRL_AVX512 void forward_avx512(const float* x, float* out, int64_t n) { forward_row(x, out, n); }

using Backward = void (*)(const float*, const float*, float*, int64_t);
void backward_plain(const float* x, const float* g, float* out, int64_t n) { backward_row(x, g, out, n); }
MRL_AVX2 void backward_avx2(const float* x, const float* g, float* out, int64_t n) { backward_row(x, g, out, n); }
MRL_AVX512 void backward_avx512(const float* x, const float* g, float* out, int64_t n) { backward_row(x, g, out, n); }

}  // namespace

void swiglu(const float* x, float* out, int64_t rows, int64_t width, int num_threads) {
  const Forward run = level() == Level::avx512 ? forward_avx512 : level() == Level::avx2 ? forward_avx2 : forward_plain;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < rows; ++row) run(x + row * 2 * width, out + row * width, width);
}

void swiglu_grad(const float* x, const float* grad_out, float* grad, int64_t rows, int64_t width, int num_threads) {
  const Backward run =
      level() == Level::avx512 ? backward_avx512 : level() == Level::avx2 ? backward_avx2 : backward_plain;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    run(x + row * 2 * width, grad_out + row * width, grad + row * 2 * width, width);
}

}  // namespace mrl
