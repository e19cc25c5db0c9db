// copy_spans: cut the jobs into pieces of similar size, and let the threads take them in turn.
#include <algorithm>
#include <vector>

#include "cast_rows.h"
#include "numbers.h"
#include "ops.h"

namespace mrl {
namespace {

constexpr int64_t kPiece = 1 << 18;             // elements: large enough to hide scheduling, small enough to balance
constexpr int64_t kStreamingBytes = 16 << 20;   // a call that writes more than this does not find it in cache later

struct Piece {
  const char* src;
  char* dst;
  int64_t rows, cols, src_stride, dst_stride;  // cols in elements, strides in bytes
};

void cut(const Piece& job, int64_t src_bytes, int64_t dst_bytes, std::vector<Piece>& pieces) {
  const int64_t cols = std::min(job.cols, kPiece), rows = std::max<int64_t>(1, kPiece / cols);
  for (int64_t r = 0; r < job.rows; r += rows)
    for (int64_t c = 0; c < job.cols; c += cols)
      pieces.push_back({job.src + r * job.src_stride + c * src_bytes, job.dst + r * job.dst_stride + c * dst_bytes,
                        std::min(rows, job.rows - r), std::min(cols, job.cols - c), job.src_stride, job.dst_stride});
}

}  // namespace

void copy_spans(const void* const* sources, void* const* destinations, const CopyJob* jobs, int64_t num_jobs,
                int src_type, int dst_type, int64_t src_bytes, int64_t dst_bytes, int num_threads) {
  std::vector<Piece> pieces;
  int64_t written = 0;
  for (int64_t i = 0; i < num_jobs; ++i) {
    CopyJob job = jobs[i];
    if (job.rows <= 0 || job.cols <= 0) continue;
    if (job.src_stride == job.cols && job.dst_stride == job.cols) {
      job.cols *= job.rows;
      job.rows = 1;
    }
    written += job.rows * job.cols * dst_bytes;
    cut({static_cast<const char*>(sources[job.src_index]) + job.src_offset * src_bytes,
         static_cast<char*>(destinations[job.dst_index]) + job.dst_offset * dst_bytes, job.rows, job.cols,
         job.src_stride * src_bytes, job.dst_stride * dst_bytes},
        src_bytes, dst_bytes, pieces);
  }
  const CastRow row = cast_row(src_type, dst_type);
  const int64_t unit = src_type == kRaw ? src_bytes : 1;  // raw rows are counted in bytes
  const bool streaming = written > kStreamingBytes;
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_pieces > 1 && num_threads > 1)
  for (int64_t i = 0; i < num_pieces; ++i) {
    const Piece& piece = pieces[i];
    for (int64_t r = 0; r < piece.rows; ++r)
      row(piece.src + r * piece.src_stride, piece.dst + r * piece.dst_stride, piece.cols * unit, streaming);
    if (streaming) drain_stores();
  }
}

}  // namespace mrl
