// The int64 tables that Python hands over, one row per struct; field order is the column order of the interfaces.
#pragma once
#include "portable.h"

namespace mrl {

struct CopyJob {  // megatron_rl/ops/copy_spans/interface.py, JOB_COLUMNS; offsets and strides in elements
  int64_t src_index, dst_index, src_offset, dst_offset, rows, cols, src_stride, dst_stride;
};

struct ChecksumSpan {  // megatron_rl/ops/span_checksum/interface.py, SPAN_COLUMNS; units are words, see there
  int64_t tensor_index, slot, key, logical_row, logical_col, offset, rows, cols, stride;
};

struct Tile {  // megatron_rl/ops/tiling.py: rows x cols from (row, col) on, of row `item` of one of the tables above
  int64_t item, row, col, rows, cols;
};

static_assert(sizeof(CopyJob) == 8 * 8 && sizeof(ChecksumSpan) == 9 * 8 && sizeof(Tile) == 5 * 8, "packed int64 rows");

}  // namespace mrl
