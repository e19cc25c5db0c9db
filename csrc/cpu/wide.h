// Sixteen float32 lanes, for loops whose lanes are independent of one another, and the exponential in them.
#pragma once
#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes Wide is inlined: no calling convention matters
#endif

namespace mrl {

constexpr int64_t kWide = 16;
using Wide = float __attribute__((vector_size(64)));
using WideInt = int32_t __attribute__((vector_size(64)));

MRL_INLINE Wide load_wide(const float* p) {
  Wide x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
MRL_INLINE void store_wide(float* p, Wide x) { std::memcpy(p, &x, sizeof x); }

// The same for the end of a row: lanes from `count` on are 0, and not stored.
MRL_INLINE Wide load_wide(const float* p, int64_t count) {
  if (count >= kWide) return load_wide(p);
  Wide x = {};
  std::memcpy(&x, p, count * sizeof(float));
  return x;
}
MRL_INLINE void store_wide(float* p, Wide x, int64_t count) {
  if (count >= kWide)
    store_wide(p, x);
  else
    std::memcpy(p, &x, count * sizeof(float));
}

// exp(x) for x <= 0 and a little above, to 2 units in the last place (Cephes expf); 0 far below, NaN of NaN.
MRL_INLINE Wide exp_wide(Wide x) {
  const Wide low = Wide{} - 87.0f;
  const Wide clamped = x < low ? low : x;
  const Wide shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers
  const Wide n = shifted - 12582912.0f;
  const Wide r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const WideInt bits = (__builtin_convertvector(n, WideInt) + 127) << 23;
  Wide power;
  std::memcpy(&power, &bits, sizeof power);
  return x < low ? Wide{} : p * power;
}

// tanh(x), to 3 units in the last place: a polynomial near 0 (Cephes tanhf), else by exp(-2|x|).
MRL_INLINE Wide tanh_wide(Wide x) {
  const Wide size = x < Wide{} ? -x : x, z = x * x;
  Wide p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Wide near = p * z * x + x;
  const Wide e = exp_wide(size * -2.0f), far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? near : x < Wide{} ? -far : far;
}

// 1 / (1 + exp(-x)), without overflow.
MRL_INLINE Wide sigmoid_wide(Wide x) {
  const Wide small = exp_wide(x < Wide{} ? x : -x);  // exp(-|x|)
  return (x < Wide{} ? small : Wide{} + 1.0f) / (small + 1.0f);
}

}  // namespace mrl
