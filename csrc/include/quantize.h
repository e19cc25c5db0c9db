// The scale of one 128 x 128 block of float8 e4m3 codes, as DeepSeek-V3's checkpoints and SGLang define it
// (weight_scale_inv: value = code * scale).
#pragma once
#include "numbers.h"

namespace mrl {

constexpr int kBlock = 128;

// largest: the maximum of the magnitude bits of a block. Magnitudes order as integers, NaN above infinity, so the
// maximum is independent of order and carries NaN: such a block gets a NaN scale.
MRL_INLINE float block_scale(uint32_t largest) {
  const uint32_t floor_bits = 0x2B8CBCCCu;  // 1e-12f: a block of zeros still has a scale to divide by
  if (largest > kInfinity) return float_of(kQuietNan);
  return float_of(largest > floor_bits ? largest : floor_bits) / 448.0f;
}

}  // namespace mrl
