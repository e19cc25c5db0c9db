// accumulate: the sum of several parts in fp32, in their order, one block of elements at a time.
#include "numbers.h"
#include "ops.h"
#include "vector_level.h"

namespace mrl {
namespace {

constexpr int64_t kElements = 4096;  // of a block: its fp32 sums stay in the first-level cache

template <class S, class D>
MRL_INLINE void sum_block(const void* const* parts, int64_t num_parts, void* out, int64_t first, int64_t n) {
  float sums[kElements];
  const S* part = static_cast<const S*>(parts[0]) + first;
  for (int64_t i = 0; i < n; ++i) sums[i] = Cast<float>::from(part[i]);
  for (int64_t p = 1; p < num_parts; ++p) {
    part = static_cast<const S*>(parts[p]) + first;
    for (int64_t i = 0; i < n; ++i) sums[i] += Cast<float>::from(part[i]);
  }
  D* result = static_cast<D*>(out) + first;
  for (int64_t i = 0; i < n; ++i) result[i] = Cast<D>::from(sums[i]);
}

using SumBlock = void (*)(const void* const*, int64_t, void*, int64_t, int64_t);

template <class S, class D>
struct Levels {
  static void plain(const void* const* p, int64_t k, void* o, int64_t f, int64_t n) { sum_block<S, D>(p, k, o, f, n); }
  MRL_AVX2 static void avx2(const void* const* p, int64_t k, void* o, int64_t f, int64_t n) {
    sum_block<S, D>(p, k, o, f, n);
  }
  MRL_AVX512 static void avx512(const void* const* p, int64_t k, void* o, int64_t f, int64_t n) {
    sum_block<S, D>(p, k, o, f, n);
  }
  static SumBlock now() {
    return level() == Level::avx512 ? avx512 : level() == Level::avx2 ? avx2 : plain;
  }
};

}  // namespace

void accumulate(const void* const* parts, int64_t num_parts, void* out, int64_t n, int type, int out_type,
                int num_threads) {
  const SumBlock narrow = out_type == kFloat32 ? Levels<Bf16, float>::now() : Levels<Bf16, Bf16>::now();
  const SumBlock wide = out_type == kFloat32 ? Levels<float, float>::now() : Levels<float, Bf16>::now();
  const SumBlock run = type == kFloat32 ? wide : narrow;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t first = 0; first < n; first += kElements)
    run(parts, num_parts, out, first, n - first < kElements ? n - first : kElements);
}

}  // namespace mrl
