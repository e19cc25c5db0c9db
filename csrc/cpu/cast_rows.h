// One contiguous row of elements from one number type to another, with the stores that fit its destination.
#pragma once
#include <cstdint>

namespace mrl {

// Writes n elements. `streaming` uses non-temporal stores, which spare the read of each destination line: right when
// more is written than the caches hold. Ordering: call `drain_stores` before another thread reads.
using CastRow = void (*)(const void* src, void* dst, int64_t n, bool streaming);

// The row function for a pair of NumberType codes at the current vector level; for kRaw, n counts bytes.
// Returns nullptr for an unknown pair.
CastRow cast_row(int src_type, int dst_type);

void drain_stores();

}  // namespace mrl
