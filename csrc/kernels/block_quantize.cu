// block_quantize: one block of 256 threads per 128 x 128 tile, held in registers between the maximum and the division:
// a warp takes a row at a time, four neighbouring columns per thread, sixteen rows.
#include "device.h"
#include "launchers.h"
#include "numbers.h"
#include "quantize.h"

namespace mrl {
namespace {

constexpr int kRowsPerPass = kThreads / kWarp, kPasses = kBlock / kRowsPerPass, kCols = kBlock / kWarp;

template <class S>
__global__ void __launch_bounds__(kThreads)
    block_quantize_kernel(const S* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, bool whole_packs) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kBlock + threadIdx.x / kWarp;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x % kWarp * kCols;
  uint32_t wide[kPasses][kCols];
  uint32_t largest = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t row = first_row + pass * kRowsPerPass;
    Pack<S, kCols> in{};
    if (row < rows && whole_packs && col < cols) {
      in = *reinterpret_cast<const Pack<S, kCols>*>(x + row * cols + col);
    } else if (row < rows) {
#pragma unroll
      for (int k = 0; k < kCols; ++k)
        if (col + k < cols) in.v[k] = x[row * cols + col + k];
    }
#pragma unroll
    for (int k = 0; k < kCols; ++k) {
      wide[pass][k] = f32_bits_from(in.v[k]);
      const uint32_t magnitude = wide[pass][k] & kMagnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  const float scale = block_scale(block_reduce(largest, Max{}));
  if (threadIdx.x == 0) scales[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = scale;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t row = first_row + pass * kRowsPerPass;
    Pack<uint8_t, kCols> out;
#pragma unroll
    for (int k = 0; k < kCols; ++k) out.v[k] = e4m3_from(bits_of(float_of(wide[pass][k]) / scale));
    if (row < rows && whole_packs && col < cols) {
      *reinterpret_cast<Pack<uint8_t, kCols>*>(codes + row * cols + col) = out;
    } else if (row < rows) {
#pragma unroll
      for (int k = 0; k < kCols; ++k)
        if (col + k < cols) codes[row * cols + col + k] = out.v[k];
    }
  }
}

template <class S>
int run(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, void* stream) {
  const dim3 grid(static_cast<unsigned>((cols + kBlock - 1) / kBlock), static_cast<unsigned>((rows + kBlock - 1) / kBlock));
  const dim3 threads(kThreads);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(codes);
  const bool whole_packs = cols % kCols == 0 && (addresses & 15u) == 0;
  return MRL_LAUNCH(block_quantize_kernel<S>, grid, threads, stream, static_cast<const S*>(x), codes, scales, rows, cols,
                    whole_packs);
}

}  // namespace
}  // namespace mrl

int mrl_block_quantize(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, int type,
                       void* stream) {
  switch (type) {
    case mrl::kFloat32: return mrl::run<float>(x, codes, scales, rows, cols, stream);
    case mrl::kBfloat16: return mrl::run<mrl::Bf16>(x, codes, scales, rows, cols, stream);
    case mrl::kFloat16: return mrl::run<mrl::F16>(x, codes, scales, rows, cols, stream);
    default: return 1;  // cudaErrorInvalidValue
  }
}
