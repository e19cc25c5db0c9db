// Eight float32 lanes, so that sums have one fixed order on every processor and need no relaxed arithmetic.
#pragma once
#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes Lanes is inlined: no calling convention matters
#endif

namespace mrl {

constexpr int64_t kLanes = 8;
using Lanes = float __attribute__((vector_size(32)));

MRL_INLINE Lanes load_lanes(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MRL_INLINE void store_lanes(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
MRL_INLINE float sum_lanes(Lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

MRL_INLINE float dot(const float* a, const float* b, int64_t n) {
  Lanes sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums += load_lanes(a + i) * load_lanes(b + i);
  float result = sum_lanes(sums);
  for (; i < n; ++i) result += a[i] * b[i];
  return result;
}

}  // namespace mrl
