// One source, two compilers: what nvcc needs beside a function that g++ also compiles.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MRL_INLINE __host__ __device__ __forceinline__
#else
#define MRL_INLINE inline __attribute__((always_inline))
#endif
