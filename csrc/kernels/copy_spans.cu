// copy_spans: one block per tile. A tile is at most a few thousand elements of one job, whole rows where they are
// short, so that narrow and wide jobs keep all threads busy in the same launch.
#include "device.h"
#include "launchers.h"
#include "numbers.h"

namespace mrl {
namespace {

struct Rectangle {
  const char* src;
  char* dst;
  int64_t src_stride, dst_stride;  // bytes
  int rows, cols;
};

template <class S, class D>
struct Element {
  __device__ __forceinline__ static D from(S x) { return Cast<D>::from(x); }
};
template <class T>
struct Element<T, T> {
  __device__ __forceinline__ static T from(T x) { return x; }
};

template <class S, class D, int N>
__device__ __forceinline__ void copy_tile(const Rectangle& tile) {
  // A pack wider than 16 bytes on one side (float32 to bfloat16) is two accesses on that side.
  const int per_row = tile.cols / N, total = tile.rows * per_row;
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int row = i / per_row, col = (i - row * per_row) * N;
    const S* src = reinterpret_cast<const S*>(tile.src + row * tile.src_stride) + col;
    D* dst = reinterpret_cast<D*>(tile.dst + row * tile.dst_stride) + col;
    const Pack<S, N> in = *reinterpret_cast<const Pack<S, N>*>(src);
    Pack<D, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.v[k] = Element<S, D>::from(in.v[k]);
    *reinterpret_cast<Pack<D, N>*>(dst) = out;
  }
}

template <class S, class D>
__global__ void __launch_bounds__(kThreads)
    copy_spans_kernel(const void* const* sources, void* const* destinations, const CopyJob* jobs, const Tile* tiles) {
  constexpr int kPack = 16 / (sizeof(S) < sizeof(D) ? sizeof(S) : sizeof(D));
  const Tile at = tiles[blockIdx.x];
  const CopyJob job = jobs[at.item];
  Rectangle tile;
  tile.src_stride = job.src_stride * static_cast<int64_t>(sizeof(S));
  tile.dst_stride = job.dst_stride * static_cast<int64_t>(sizeof(D));
  tile.src = static_cast<const char*>(sources[job.src_index]) + at.row * tile.src_stride +
             (job.src_offset + at.col) * static_cast<int64_t>(sizeof(S));
  tile.dst = static_cast<char*>(destinations[job.dst_index]) + at.row * tile.dst_stride +
             (job.dst_offset + at.col) * static_cast<int64_t>(sizeof(D));
  tile.rows = static_cast<int>(at.rows);
  tile.cols = static_cast<int>(at.cols);
  const bool whole_packs = tile.cols % kPack == 0 && aligned16(tile.src) && aligned16(tile.dst) &&
                           (tile.rows == 1 || ((tile.src_stride | tile.dst_stride) & 15) == 0);
  if (whole_packs) {
    copy_tile<S, D, kPack>(tile);
  } else {
    copy_tile<S, D, 1>(tile);
  }
}

struct Launch {
  const void* const* sources;
  void* const* destinations;
  const CopyJob* jobs;
  const Tile* tiles;
  int64_t num_tiles;
  void* stream;

  template <class S, class D>
  int run() const {
    const dim3 grid(static_cast<unsigned>(num_tiles)), threads(kThreads);
    return MRL_LAUNCH((copy_spans_kernel<S, D>), grid, threads, stream, sources, destinations, jobs, tiles);
  }

  int raw(int element_bytes) const {
    switch (element_bytes) {
      case 1: return run<uint8_t, uint8_t>();
      case 2: return run<uint16_t, uint16_t>();
      case 4: return run<uint32_t, uint32_t>();
      case 8: return run<uint64_t, uint64_t>();
      default: return 1;  // cudaErrorInvalidValue
    }
  }
};

}  // namespace
}  // namespace mrl

int mrl_copy_spans(const void* const* sources, void* const* destinations, const mrl::CopyJob* jobs,
                   const mrl::Tile* tiles, int64_t num_tiles, int src_type, int dst_type, int element_bytes,
                   void* stream) {
  using namespace mrl;
  const Launch launch{sources, destinations, jobs, tiles, num_tiles, stream};
  switch (src_type * 4 + dst_type) {
    case kRaw * 4 + kRaw: return launch.raw(element_bytes);
    case kFloat32 * 4 + kBfloat16: return launch.run<float, Bf16>();
    case kFloat32 * 4 + kFloat16: return launch.run<float, F16>();
    case kBfloat16 * 4 + kFloat32: return launch.run<Bf16, float>();
    case kBfloat16 * 4 + kFloat16: return launch.run<Bf16, F16>();
    case kFloat16 * 4 + kFloat32: return launch.run<F16, float>();
    case kFloat16 * 4 + kBfloat16: return launch.run<F16, Bf16>();
    default: return 1;
  }
}
