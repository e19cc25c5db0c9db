// span_checksum: one block per tile. A thread keeps the keys of its eight columns in registers and walks down the rows,
// so that a word costs one multiply-add; one atomic addition per block ends it. The sum wraps: order does not matter.
#include "device.h"
#include "launchers.h"
#include "numbers.h"
#include "position_key.h"

namespace mrl {
namespace {

constexpr int kWords = 8;  // columns of one thread

template <class S, class W>
struct Word {  // elements of type S are first cast to W's number type
  __device__ __forceinline__ static uint64_t of(S x) { return Cast<W>::from(x).bits; }
};
template <class T>
struct Word<T, T> {
  __device__ __forceinline__ static uint64_t of(T x) { return x; }
};

// The rows of one thread: from `first` on in steps of `step`, `count` of kWords columns (all of them when Whole).
template <class S, class W, bool Whole>
__device__ __forceinline__ uint64_t sum_rows(const S* base, const ChecksumSpan& span, uint64_t logical_row,
                                             const uint64_t* keys, int count, int first, int rows, int step) {
  uint64_t sum = 0;
#pragma unroll 1
  for (int row = first; row < rows; row += step) {
    const S* at = base + row * span.stride;
    uint64_t dot = 0;
    if constexpr (Whole) {
      const Pack<S, kWords> in = *reinterpret_cast<const Pack<S, kWords>*>(at);
#pragma unroll
      for (int k = 0; k < kWords; ++k) dot += (Word<S, W>::of(in.v[k]) + 1) * keys[k];
    } else {
#pragma unroll
      for (int k = 0; k < kWords; ++k)
        if (k < count) dot += (Word<S, W>::of(at[k]) + 1) * keys[k];
    }
    sum += row_key(span.key, logical_row + row) * dot;
  }
  return sum;
}

template <class S, class W>
__global__ void __launch_bounds__(kThreads) span_checksum_kernel(const void* const* tensors, const ChecksumSpan* spans,
                                                                 const Tile* tiles, unsigned long long* sums) {
  const Tile tile = tiles[blockIdx.x];
  const ChecksumSpan span = spans[tile.item];
  const S* base = static_cast<const S*>(tensors[span.tensor_index]) + span.offset + tile.row * span.stride + tile.col;
  const int rows = static_cast<int>(tile.rows), cols = static_cast<int>(tile.cols);
  const bool aligned = aligned16(base) && (rows == 1 || (span.stride * static_cast<int64_t>(sizeof(S))) % 16 == 0);
  int groups = 1;  // threads side by side on a row: a power of two, so that they divide the block
  while (groups < kThreads && groups * kWords < cols) groups *= 2;
  const int first_row = threadIdx.x / groups, rows_at_once = kThreads / groups;
  uint64_t sum = 0;
  for (int col = threadIdx.x % groups * kWords; col < cols; col += groups * kWords) {
    uint64_t keys[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) keys[k] = col_key(static_cast<uint64_t>(span.logical_col + tile.col + col + k));
    const int count = cols - col < kWords ? cols - col : kWords;
    const uint64_t logical_row = static_cast<uint64_t>(span.logical_row + tile.row);
    sum += aligned && count == kWords
               ? sum_rows<S, W, true>(base + col, span, logical_row, keys, count, first_row, rows, rows_at_once)
               : sum_rows<S, W, false>(base + col, span, logical_row, keys, count, first_row, rows, rows_at_once);
  }
  sum = block_reduce(sum, Sum{});
  if (threadIdx.x == 0) atomicAdd(sums + span.slot, static_cast<unsigned long long>(sum));
}

struct Launch {
  const void* const* tensors;
  const ChecksumSpan* spans;
  const Tile* tiles;
  int64_t num_tiles;
  unsigned long long* sums;
  void* stream;

  template <class S, class W>
  int run() const {
    const dim3 grid(static_cast<unsigned>(num_tiles)), threads(kThreads);
    return MRL_LAUNCH((span_checksum_kernel<S, W>), grid, threads, stream, tensors, spans, tiles, sums);
  }
};

}  // namespace
}  // namespace mrl

int mrl_span_checksum(const void* const* tensors, const mrl::ChecksumSpan* spans, const mrl::Tile* tiles,
                      int64_t num_tiles, int type, int as_type, int word_bytes, unsigned long long* sums,
                      void* stream) {
  using namespace mrl;
  const Launch launch{tensors, spans, tiles, num_tiles, sums, stream};
  switch (type * 4 + as_type) {
    case kRaw * 4 + kRaw: return word_bytes == 1 ? launch.run<uint8_t, uint8_t>() : launch.run<uint16_t, uint16_t>();
    case kFloat32 * 4 + kBfloat16: return launch.run<float, Bf16>();
    case kFloat32 * 4 + kFloat16: return launch.run<float, F16>();
    case kBfloat16 * 4 + kFloat16: return launch.run<Bf16, F16>();
    case kFloat16 * 4 + kBfloat16: return launch.run<F16, Bf16>();
    default: return 1;  // cudaErrorInvalidValue
  }
}
