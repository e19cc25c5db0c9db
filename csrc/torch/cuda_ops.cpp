// The CUDA operations as torch.ops.megatron_rl_cuda.*, over the stable ABI, on the current stream of their device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace {

using torch::stable::Tensor;

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) != 0)
    throw std::runtime_error("no current CUDA stream on device " + std::to_string(tensor.get_device()));
  return stream;
}

void check(int error, const char* op) {
  if (error != 0) throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + " at launch");
}

// `sources` and `destinations` are int64 tensors of device addresses.
void copy_spans(Tensor sources, Tensor destinations, Tensor jobs, Tensor tiles, int64_t src_type, int64_t dst_type,
                int64_t element_bytes) {
  check(mrl_copy_spans(static_cast<const void* const*>(sources.data_ptr()),
                       static_cast<void* const*>(destinations.data_ptr()),
                       static_cast<const mrl::CopyJob*>(jobs.data_ptr()), static_cast<const mrl::Tile*>(tiles.data_ptr()),
                       tiles.size(0), static_cast<int>(src_type), static_cast<int>(dst_type),
                       static_cast<int>(element_bytes), stream_of(jobs)),
        "copy_spans");
}

void block_quantize(Tensor x, Tensor codes, Tensor scales, int64_t type) {
  check(mrl_block_quantize(x.data_ptr(), static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales.data_ptr()),
                           x.size(0), x.size(1), static_cast<int>(type), stream_of(x)),
        "block_quantize");
}

// `parts` is an int64 tensor of device addresses.
void accumulate(Tensor parts, Tensor out, int64_t type, int64_t out_type, bool aligned) {
  check(mrl_accumulate(static_cast<const void* const*>(parts.data_ptr()), parts.size(0), out.data_ptr(), out.numel(),
                       static_cast<int>(type), static_cast<int>(out_type), aligned, stream_of(out)),
        "accumulate");
}

void span_checksum(Tensor tensors, Tensor spans, Tensor tiles, Tensor sums, int64_t type, int64_t as_type,
                   int64_t word_bytes) {
  check(mrl_span_checksum(static_cast<const void* const*>(tensors.data_ptr()),
                          static_cast<const mrl::ChecksumSpan*>(spans.data_ptr()),
                          static_cast<const mrl::Tile*>(tiles.data_ptr()), tiles.size(0), static_cast<int>(type),
                          static_cast<int>(as_type), static_cast<int>(word_bytes),
                          static_cast<unsigned long long*>(sums.data_ptr()), stream_of(sums)),
        "span_checksum");
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_rl_cuda, library) {
  library.def(
      "copy_spans(Tensor sources, Tensor destinations, Tensor jobs, Tensor tiles, int src_type, int dst_type, "
      "int element_bytes) -> ()");
  library.def("block_quantize(Tensor x, Tensor(a!) codes, Tensor(b!) scales, int type) -> ()");
  library.def("accumulate(Tensor parts, Tensor(a!) out, int type, int out_type, bool aligned) -> ()");
  library.def(
      "span_checksum(Tensor tensors, Tensor spans, Tensor tiles, Tensor(a!) sums, int type, int as_type, "
      "int word_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl_cuda, CUDA, library) {
  library.impl("copy_spans", TORCH_BOX(&copy_spans));
  library.impl("block_quantize", TORCH_BOX(&block_quantize));
  library.impl("accumulate", TORCH_BOX(&accumulate));
  library.impl("span_checksum", TORCH_BOX(&span_checksum));
}
