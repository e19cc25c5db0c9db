// span_checksum: tiles of columns whose keys stay in the first-level cache, four rows at a time.
//
// A key is split into its 32-bit halves: word * key is then two 32 x 32 -> 64 bit products, which every vector
// instruction set has, and the halves are put together once per row.
#include <algorithm>
#include <vector>

#include "cast_rows.h"
#include "numbers.h"
#include "ops.h"
#include "position_key.h"
#include "vector_level.h"

namespace mrl {
namespace {

constexpr int64_t kTileCols = 1024, kTaskRows = 64;
constexpr int kRowsAtOnce = 4;

struct ColumnKeys {
  uint32_t low[kTileCols], high[kTileCols];
  uint64_t total;  // the "+1" of every word: sum of the keys, see the definition
};

MRL_INLINE void fill(ColumnKeys& keys, uint64_t first, int64_t cols) {
  keys.total = 0;
  for (int64_t c = 0; c < cols; ++c) {
    const uint64_t key = col_key(first + c);
    keys.low[c] = static_cast<uint32_t>(key);
    keys.high[c] = static_cast<uint32_t>(key >> 32);
    keys.total += key;
  }
}

template <class W, int R>
MRL_INLINE void dot(const W* const* rows, const ColumnKeys& keys, int64_t cols, uint64_t* dots) {
  uint64_t low[R] = {}, high[R] = {};
  for (int64_t c = 0; c < cols; ++c)
    for (int r = 0; r < R; ++r) {
      low[r] += static_cast<uint64_t>(rows[r][c]) * keys.low[c];
      high[r] += static_cast<uint64_t>(rows[r][c]) * keys.high[c];
    }
  for (int r = 0; r < R; ++r) dots[r] = low[r] + (high[r] << 32);
}

template <class W>
using Dot = void (*)(const W* const*, const ColumnKeys&, int64_t, uint64_t*);
template <class W, int R>
void dot_plain(const W* const* rows, const ColumnKeys& k, int64_t n, uint64_t* d) { dot<W, R>(rows, k, n, d); }
template <class W, int R>
MRL_AVX2 void dot_avx2(const W* const* rows, const ColumnKeys& k, int64_t n, uint64_t* d) { dot<W, R>(rows, k, n, d); }
template <class W, int R>
MRL_AVX512 void dot_avx512(const W* const* rows, const ColumnKeys& k, int64_t n, uint64_t* d) {
  dot<W, R>(rows, k, n, d);
}

template <class W, int R>
Dot<W> at_level() {
  switch (level()) {
    case Level::avx512: return dot_avx512<W, R>;
    case Level::avx2: return dot_avx2<W, R>;
    default: return dot_plain<W, R>;
  }
}

// Where the words of a row come from: memory as it is, or elements cast on the way.
struct Source {
  const char* data;
  int64_t stride;  // bytes
  int64_t element_bytes;
  CastRow cast;    // nullptr: the memory holds the words
};

template <class W>
uint64_t sum_rows(const Source& source, const ChecksumSpan& span, int64_t first, int64_t last) {
  ColumnKeys keys;
  W cast_words[kRowsAtOnce][kTileCols];
  const Dot<W> dot_many = at_level<W, kRowsAtOnce>(), dot_one = at_level<W, 1>();
  uint64_t sum = 0;
  for (int64_t col = 0; col < span.cols; col += kTileCols) {
    const int64_t cols = std::min(kTileCols, span.cols - col);
    fill(keys, static_cast<uint64_t>(span.logical_col + col), cols);
    for (int64_t row = first; row < last;) {
      const int count = last - row >= kRowsAtOnce ? kRowsAtOnce : 1;
      const W* words[kRowsAtOnce];
      for (int r = 0; r < count; ++r) {
        const char* at = source.data + (row + r) * source.stride + col * source.element_bytes;
        if (source.cast != nullptr) source.cast(at, cast_words[r], cols, false);
        words[r] = source.cast != nullptr ? cast_words[r] : reinterpret_cast<const W*>(at);
      }
      uint64_t dots[kRowsAtOnce];
      (count == 1 ? dot_one : dot_many)(words, keys, cols, dots);
      for (int r = 0; r < count; ++r)
        sum += row_key(static_cast<uint64_t>(span.key), static_cast<uint64_t>(span.logical_row + row + r)) *
               (dots[r] + keys.total);
      row += count;
    }
  }
  return sum;
}

struct Task {
  const ChecksumSpan* span;
  int64_t first, last;
};

}  // namespace

void span_checksum(const void* const* tensors, const ChecksumSpan* spans, int64_t num_spans, int type, int as_type,
                   int word_bytes, uint64_t* sums, int num_threads) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < num_spans; ++i)
    for (int64_t row = 0; row < spans[i].rows; row += kTaskRows)
      tasks.push_back({spans + i, row, std::min(row + kTaskRows, spans[i].rows)});
  const CastRow cast = type == kRaw ? nullptr : cast_row(type, as_type);
  const int64_t element_bytes = type == kRaw ? word_bytes : (type == kFloat32 ? 4 : 2);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_tasks > 1 && num_threads > 1)
  for (int64_t i = 0; i < num_tasks; ++i) {
    const ChecksumSpan& span = *tasks[i].span;
    const Source source{static_cast<const char*>(tensors[span.tensor_index]) + span.offset * element_bytes,
                        span.stride * element_bytes, element_bytes, cast};
    const uint64_t sum = word_bytes == 1 ? sum_rows<uint8_t>(source, span, tasks[i].first, tasks[i].last)
                                         : sum_rows<uint16_t>(source, span, tasks[i].first, tasks[i].last);
#pragma omp atomic
    sums[span.slot] += sum;
  }
}

}  // namespace mrl
