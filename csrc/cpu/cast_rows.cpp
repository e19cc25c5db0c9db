// See cast_rows.h. One formula per cast (include/numbers.h), vectorised by the compiler at each level.
#include "cast_rows.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "vector_level.h"

namespace mrl {
namespace {

constexpr int64_t kLine = 64, kPage = 4096;  // bytes

// One line to memory, around the caches. At most 32 bytes at a time: a converted line was stored in such pieces, and
// the processor cannot forward two stores to one wider load.
inline void stream_plain(void* dst, const void* src) {
#if defined(__x86_64__)
  auto* d = static_cast<__m128i*>(dst);
  auto* s = static_cast<const __m128i*>(src);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(d + i, _mm_loadu_si128(s + i));
#else
  std::memcpy(dst, src, kLine);
#endif
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline void stream_vector(void* dst, const void* src) {
  auto* d = static_cast<__m256i*>(dst);
  auto* s = static_cast<const __m256i*>(src);
  _mm256_stream_si256(d, _mm256_loadu_si256(s));
  _mm256_stream_si256(d + 1, _mm256_loadu_si256(s + 1));
}
#else
inline void stream_vector(void* dst, const void* src) { stream_plain(dst, src); }
#endif

int64_t bytes_to_line(const void* p) { return (kLine - reinterpret_cast<uintptr_t>(p) % kLine) % kLine; }

template <class S, class D>
MRL_INLINE void convert(const S* __restrict src, D* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = Cast<D>::from(src[i]);
}

// Reads and writes alternate line by line, so that neither waits for the other; the processor's own prefetching stops
// at the end of a page, so each page asks for the next.
template <class S, class D, void (*Store)(void*, const void*)>
MRL_INLINE void stream(const S* __restrict src, D* __restrict dst, int64_t num_lines) {
  constexpr int64_t per_line = kLine / sizeof(D), per_page = kPage / (per_line * sizeof(S));
  for (int64_t i = 0; i < num_lines; ++i) {
    if (i % per_page == 0) __builtin_prefetch(src + (i + per_page) * per_line);
    alignas(kLine) D line[per_line];
    convert(src + i * per_line, line, per_line);
    Store(dst + i * per_line, line);
  }
}

struct Plain {
  template <class S, class D>
  static void cached(const S* src, D* dst, int64_t n) { convert(src, dst, n); }
  template <class S, class D>
  static void around(const S* src, D* dst, int64_t lines) { stream<S, D, stream_plain>(src, dst, lines); }
};
struct Avx2 {
  template <class S, class D>
  MRL_AVX2 static void cached(const S* src, D* dst, int64_t n) { convert(src, dst, n); }
  template <class S, class D>
  MRL_AVX2 static void around(const S* src, D* dst, int64_t lines) { stream<S, D, stream_vector>(src, dst, lines); }
};
struct Avx512 {
  template <class S, class D>
  MRL_AVX512 static void cached(const S* src, D* dst, int64_t n) { convert(src, dst, n); }
  template <class S, class D>
  MRL_AVX512 static void around(const S* src, D* dst, int64_t lines) { stream<S, D, stream_vector>(src, dst, lines); }
};

template <class S, class D, class Vector>
void cast(const void* from, void* to, int64_t n, bool streaming) {
  auto* src = static_cast<const S*>(from);
  auto* dst = static_cast<D*>(to);
  constexpr int64_t per_line = kLine / sizeof(D);
  const int64_t head = bytes_to_line(dst) / static_cast<int64_t>(sizeof(D));
  if (!streaming || n < head + per_line) return Vector::cached(src, dst, n);
  const int64_t lines = (n - head) / per_line, tail = head + lines * per_line;
  Vector::cached(src, dst, head);
  Vector::around(src + head, dst + head, lines);
  Vector::cached(src + tail, dst + tail, n - tail);
}

void copy_bytes(const void* from, void* to, int64_t n, bool streaming) {
  const int64_t head = bytes_to_line(to);
  if (!streaming || n < head + kLine) {
    std::memcpy(to, from, n);
    return;
  }
  auto* src = static_cast<const char*>(from);
  auto* dst = static_cast<char*>(to);
  std::memcpy(dst, src, head);
  int64_t i = head;
  for (; i + kLine <= n; i += kLine) stream_plain(dst + i, src + i);
  std::memcpy(dst + i, src + i, n - i);
}

template <class S, class D>
CastRow at_level() {
  switch (level()) {
    case Level::avx512: return cast<S, D, Avx512>;
    case Level::avx2: return cast<S, D, Avx2>;
    default: return cast<S, D, Plain>;
  }
}

}  // namespace

CastRow cast_row(int src_type, int dst_type) {
  switch (src_type * 4 + dst_type) {
    case kRaw * 4 + kRaw: return copy_bytes;
    case kFloat32 * 4 + kBfloat16: return at_level<float, Bf16>();
    case kFloat32 * 4 + kFloat16: return at_level<float, F16>();
    case kBfloat16 * 4 + kFloat32: return at_level<Bf16, float>();
    case kBfloat16 * 4 + kFloat16: return at_level<Bf16, F16>();
    case kFloat16 * 4 + kFloat32: return at_level<F16, float>();
    case kFloat16 * 4 + kBfloat16: return at_level<F16, Bf16>();
    default: return nullptr;
  }
}

void drain_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace mrl
