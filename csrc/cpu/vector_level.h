// Which vector instructions run: decided once from the processor, and lowered by tests to reach every path.
//
// The row loops are plain C++ over the shared maths of include/, compiled once per level and vectorised by the
// compiler, so that all levels agree bit for bit by construction.
#pragma once
#include <atomic>

namespace mrl {

enum class Level : int { plain = 0, avx2 = 1, avx512 = 2 };

#if defined(__x86_64__) && defined(__GNUC__)
#define MRL_AVX2 __attribute__((target("avx2,f16c"), flatten))
#if defined(__clang__)
#define MRL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), flatten))
#else
#define MRL_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"), flatten))
#endif
#else
#define MRL_AVX2
#define MRL_AVX512
#endif

inline Level supported_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Level::avx512;
  if (__builtin_cpu_supports("avx2")) return Level::avx2;
#endif
  return Level::plain;
}

inline std::atomic<int>& level_limit() {
  static std::atomic<int> limit{static_cast<int>(supported_level())};
  return limit;
}

inline Level level() { return static_cast<Level>(level_limit().load(std::memory_order_relaxed)); }

// Lower the level (never above what the processor supports); returns the level now in force.
inline int limit_level(int wanted) {
  const int top = static_cast<int>(supported_level());
  level_limit() = wanted < 0 ? 0 : (wanted > top ? top : wanted);
  return level_limit();
}

}  // namespace mrl
