// See cast_rows.h. Streaming casts convert into a small buffer in the first-level cache and copy that out with
// non-temporal stores: one formula per cast (include/numbers.h), one streaming loop for all of them.
#include "cast_rows.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "numbers.h"
#include "vector_level.h"

namespace mrl {
namespace {

constexpr int64_t kLine = 64;            // bytes
constexpr int64_t kBufferBytes = 8192;

// bytes is a multiple of kLine and dst is aligned to it.
void stream_lines(void* dst, const void* src, int64_t bytes) {
#if defined(__x86_64__)
  auto* d = static_cast<char*>(dst);
  auto* s = static_cast<const char*>(src);
  for (int64_t i = 0; i < bytes; i += kLine) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i + 32));
    const __m128i e = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i + 48), e);
  }
#else
  std::memcpy(dst, src, bytes);
#endif
}

int64_t bytes_to_line(const void* p) { return (kLine - reinterpret_cast<uintptr_t>(p) % kLine) % kLine; }

template <class S, class D>
MRL_INLINE void convert(const S* __restrict src, D* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = Cast<D>::from(src[i]);
}
template <class S, class D>
void convert_plain(const S* src, D* dst, int64_t n) { convert(src, dst, n); }
template <class S, class D>
MRL_AVX2 void convert_avx2(const S* src, D* dst, int64_t n) { convert(src, dst, n); }
template <class S, class D>
MRL_AVX512 void convert_avx512(const S* src, D* dst, int64_t n) { convert(src, dst, n); }

template <class S, class D, void (*Convert)(const S*, D*, int64_t)>
void cast(const void* from, void* to, int64_t n, bool streaming) {
  auto* src = static_cast<const S*>(from);
  auto* dst = static_cast<D*>(to);
  const int64_t head = bytes_to_line(dst) / static_cast<int64_t>(sizeof(D));
  if (!streaming || n < head + kLine) return Convert(src, dst, n);
  Convert(src, dst, head);
  alignas(kLine) D buffer[kBufferBytes / sizeof(D)];
  constexpr int64_t step = kBufferBytes / sizeof(D), per_line = kLine / sizeof(D);
  int64_t i = head;
  while (n - i >= per_line) {
    const int64_t count = std::min(step, (n - i) / per_line * per_line);
    Convert(src + i, buffer, count);
    stream_lines(dst + i, buffer, count * sizeof(D));
    i += count;
  }
  Convert(src + i, dst + i, n - i);
}

void copy_bytes(const void* from, void* to, int64_t n, bool streaming) {
  const int64_t head = bytes_to_line(to);
  if (!streaming || n < head + kLine) {
    std::memcpy(to, from, n);
    return;
  }
  auto* src = static_cast<const char*>(from);
  auto* dst = static_cast<char*>(to);
  const int64_t body = (n - head) / kLine * kLine;
  std::memcpy(dst, src, head);
  stream_lines(dst + head, src + head, body);
  std::memcpy(dst + head + body, src + head + body, n - head - body);
}

template <class S, class D>
CastRow at_level() {
  switch (level()) {
    case Level::avx512: return cast<S, D, convert_avx512<S, D>>;
    case Level::avx2: return cast<S, D, convert_avx2<S, D>>;
    default: return cast<S, D, convert_plain<S, D>>;
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
