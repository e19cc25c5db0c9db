// The C boundary of the CUDA operations. Pointers are device pointers, tables included; `stream` is a cudaStream_t.
// Each returns the launch's cudaError_t. Arguments were validated by the Python interfaces.
#pragma once
#include "tables.h"

extern "C" {

// Types are NumberType codes; both kRaw copies bits of element_bytes each.
int mrl_copy_spans(const void* const* sources, void* const* destinations, const mrl::CopyJob* jobs,
                   const mrl::Tile* tiles, int64_t num_tiles, int src_type, int dst_type, int element_bytes,
                   void* stream);

int mrl_block_quantize(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, int type,
                       void* stream);

// As mrl::accumulate in cpu/ops.h; `aligned`: all addresses are multiples of 16.
int mrl_accumulate(const void* const* parts, int64_t num_parts, void* out, int64_t n, int type, int out_type,
                   bool aligned, void* stream);

// As mrl::span_checksum in cpu/ops.h.
int mrl_span_checksum(const void* const* tensors, const mrl::ChecksumSpan* spans, const mrl::Tile* tiles,
                      int64_t num_tiles, int type, int as_type, int word_bytes, unsigned long long* sums,
                      void* stream);

}
