// Exact number formats in integer arithmetic: float32, bfloat16, float16, float8 e4m3fn.
//
// Casts round to nearest, ties to even, keep denormals and infinities, and write any NaN as the quiet NaN of the
// destination (0x7FC00000, 0x7FC0, 0x7E00, 0x7F). Hardware casts differ in their NaN bits (x86 keeps the payload,
// NVIDIA writes 0x7FFF) and in denormals (AVX512_BF16 flushes them), so none is used where bits must agree.
#pragma once
#include "portable.h"

namespace mrl {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

MRL_INLINE uint32_t bits_of(float x) {
  union {
    float f;
    uint32_t u;
  } pun;
  pun.f = x;
  return pun.u;
}

MRL_INLINE float float_of(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } pun;
  pun.u = bits;
  return pun.f;
}

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kQuietNan = 0x7FC00000u;

MRL_INLINE Bf16 bf16_from(uint32_t u) {
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return Bf16{static_cast<uint16_t>((u & kMagnitude) > kInfinity ? 0x7FC0u : rounded)};
}

MRL_INLINE F16 f16_from(uint32_t u) {
  const uint32_t sign = (u >> 16) & 0x8000u, a = u & kMagnitude;
  const uint32_t normal = (a + 0xFFFu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the unit in the last place of the sum is 2^-24, float16's smallest step: the addition rounds.
  const uint32_t denormal = bits_of(float_of(a) + 0.5f) - 0x3F000000u;
  uint32_t r = a < 0x38800000u ? denormal : normal;
  r = a >= 0x477FF000u ? 0x7C00u : r;  // 65520 and above round to infinity
  r |= sign;
  return F16{static_cast<uint16_t>(a > kInfinity ? 0x7E00u : r)};
}

MRL_INLINE uint32_t f32_bits_from(Bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  return (u & kMagnitude) > kInfinity ? kQuietNan : u;
}

MRL_INLINE uint32_t f32_bits_from(F16 x) {
  const uint32_t h = x.bits, sign = (h & 0x8000u) << 16, a = h & 0x7FFFu;
  const uint32_t normal = (a << 13) + (112u << 23);
  const uint32_t denormal = bits_of(static_cast<float>(static_cast<int32_t>(a)) * 5.9604644775390625e-8f);  // a * 2^-24
  uint32_t r = a < 0x400u ? denormal : normal;
  r = a == 0x7C00u ? kInfinity : r;
  r |= sign;
  return a > 0x7C00u ? kQuietNan : r;
}

MRL_INLINE uint32_t f32_bits_from(float x) { return bits_of(x); }

// |y| above 448 saturates: callers scale by amax / 448, whose rounding may leave the largest element one ulp above.
MRL_INLINE uint8_t e4m3_from(uint32_t u) {
  const uint32_t sign = (u >> 24) & 0x80u, magnitude = u & kMagnitude;
  const uint32_t a = magnitude > 0x43E00000u ? 0x43E00000u : magnitude;
  const uint32_t normal = (a + 0x7FFFFu + ((a >> 20) & 1u) - (120u << 23)) >> 20;
  const uint32_t denormal = bits_of(float_of(a) + 16384.0f) - 0x46800000u;  // below 2^-6 steps of 2^-9, as above
  const uint32_t r = (a < (121u << 23) ? denormal : normal) | sign;
  return static_cast<uint8_t>(magnitude > kInfinity ? 0x7Fu : r);
}

template <class D>
struct Cast;
template <>
struct Cast<Bf16> {
  template <class S>
  MRL_INLINE static Bf16 from(S x) { return bf16_from(f32_bits_from(x)); }
};
template <>
struct Cast<F16> {
  template <class S>
  MRL_INLINE static F16 from(S x) { return f16_from(f32_bits_from(x)); }
};
template <>
struct Cast<float> {
  template <class S>
  MRL_INLINE static float from(S x) { return float_of(f32_bits_from(x)); }
};

// The number types that the operations accept, as passed over the C boundary.
enum NumberType : int { kRaw = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

}  // namespace mrl
