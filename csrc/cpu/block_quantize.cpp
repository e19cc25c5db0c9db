// block_quantize: one 128 x 128 tile at a time, widened to float32 in the second-level cache.
#include <algorithm>

#include "numbers.h"
#include "ops.h"
#include "quantize.h"
#include "vector_level.h"

namespace mrl {
namespace {

struct Matrix {
  const void* data;
  uint8_t* codes;
  int64_t stride;
};

template <class S>
MRL_INLINE float quantize(const Matrix& x, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  uint32_t wide[kBlock * kBlock];
  uint32_t largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const S* __restrict src = static_cast<const S*>(x.data) + (row + r) * x.stride + col;
    uint32_t* __restrict dst = wide + r * kBlock;
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t u = f32_bits_from(src[c]);
      const uint32_t a = u & kMagnitude;
      dst[c] = u;
      largest = a > largest ? a : largest;
    }
  }
  const float scale = block_scale(largest);
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* __restrict codes = x.codes + (row + r) * x.stride + col;
    const uint32_t* __restrict src = wide + r * kBlock;
    for (int64_t c = 0; c < cols; ++c) codes[c] = e4m3_from(bits_of(float_of(src[c]) / scale));
  }
  return scale;
}

using Quantize = float (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t);
template <class S>
float quantize_plain(const Matrix& x, int64_t r, int64_t c, int64_t m, int64_t n) { return quantize<S>(x, r, c, m, n); }
template <class S>
MRL_AVX2 float quantize_avx2(const Matrix& x, int64_t r, int64_t c, int64_t m, int64_t n) {
  return quantize<S>(x, r, c, m, n);
}
template <class S>
MRL_AVX512 float quantize_avx512(const Matrix& x, int64_t r, int64_t c, int64_t m, int64_t n) {
  return quantize<S>(x, r, c, m, n);
}

template <class S>
Quantize at_level() {
  switch (level()) {
    case Level::avx512: return quantize_avx512<S>;
    case Level::avx2: return quantize_avx2<S>;
    default: return quantize_plain<S>;
  }
}

}  // namespace

void block_quantize(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, int type,
                    int num_threads) {
  const Matrix matrix{x, codes, cols};
  const Quantize tile = type == kFloat32    ? at_level<float>()
                        : type == kBfloat16 ? at_level<Bf16>()
                                            : at_level<F16>();
  const int64_t tile_rows = (rows + kBlock - 1) / kBlock, tile_cols = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < tile_rows * tile_cols; ++i) {
    const int64_t r = i / tile_cols * kBlock, c = i % tile_cols * kBlock;
    scales[i] = tile(matrix, r, c, std::min<int64_t>(kBlock, rows - r), std::min<int64_t>(kBlock, cols - c));
  }
}

}  // namespace mrl
