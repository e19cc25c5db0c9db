// Pseudo-random odd 64-bit keys of a logical row and a logical column: what ties a checksum to positions.
// The definition is in megatron_rl/ops/span_checksum/interface.py; all arithmetic is modulo 2^64.
#pragma once
#include "portable.h"

namespace mrl {

constexpr uint64_t kStep = 0x9E3779B97F4A7C15ull;    // 2^64 / golden ratio, SplitMix64's increment
constexpr uint64_t kColumnSeed = 0xD1B54A32D192ED03ull;

// SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014; constants: Stafford's mix 13).
MRL_INLINE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

MRL_INLINE uint64_t row_key(uint64_t tensor_key, uint64_t row) { return mix(tensor_key + row * kStep) | 1u; }
MRL_INLINE uint64_t col_key(uint64_t col) { return mix(kColumnSeed + col * kStep) | 1u; }

}  // namespace mrl
