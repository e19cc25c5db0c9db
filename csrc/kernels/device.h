// What a kernel body may use, for nvcc and for the host build of csrc/emul (tests only): the launch syntax, vector
// loads of 16 bytes, and the sum over a block.
#pragma once
#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define MRL_SHARED __shared__
#define MRL_LAUNCH(KERNEL, GRID, BLOCK, STREAM, ...) \
  (KERNEL<<<(GRID), (BLOCK), 0, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__), static_cast<int>(cudaGetLastError()))
#else
#include "host_device.h"
#endif

namespace mrl {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// N elements in one memory access of at most 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Every thread of a block of kThreads gets the reduction over the block. Contains a barrier; once per kernel,
// as the partial results are not protected from a second call.
template <class T, class Reduce>
__device__ __forceinline__ T block_reduce(T value, Reduce reduce) {
  MRL_SHARED T partial[kThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = reduce(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = reduce(value, partial[warp]);
  return value;
}

}  // namespace mrl
