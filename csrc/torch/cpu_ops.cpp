// The CPU operations as torch.ops.megatron_rl_cpu.*, over the stable ABI: one build serves later torch versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "ops.h"
#include "vector_level.h"

namespace {

using torch::stable::Tensor;

std::vector<const void*> addresses(const std::vector<Tensor>& tensors) {
  std::vector<const void*> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(tensor.data_ptr());
  return result;
}

void copy_spans(std::vector<Tensor> sources, std::vector<Tensor> destinations, Tensor jobs, int64_t src_type,
                int64_t dst_type, int64_t num_threads) {
  const auto from = addresses(sources), to = addresses(destinations);
  mrl::copy_spans(from.data(), const_cast<void* const*>(to.data()), static_cast<const mrl::CopyJob*>(jobs.data_ptr()),
                  jobs.size(0), static_cast<int>(src_type), static_cast<int>(dst_type), sources[0].element_size(),
                  destinations[0].element_size(), static_cast<int>(num_threads));
}

void block_quantize(Tensor x, Tensor codes, Tensor scales, int64_t type, int64_t num_threads) {
  mrl::block_quantize(x.data_ptr(), static_cast<uint8_t*>(codes.data_ptr()), static_cast<float*>(scales.data_ptr()),
                      x.size(0), x.size(1), static_cast<int>(type), static_cast<int>(num_threads));
}

void span_checksum(std::vector<Tensor> tensors, Tensor spans, Tensor sums, int64_t type, int64_t as_type,
                   int64_t word_bytes, int64_t num_threads) {
  const auto data = addresses(tensors);
  mrl::span_checksum(data.data(), static_cast<const mrl::ChecksumSpan*>(spans.data_ptr()), spans.size(0),
                     static_cast<int>(type), static_cast<int>(as_type), static_cast<int>(word_bytes),
                     static_cast<uint64_t*>(sums.data_ptr()), static_cast<int>(num_threads));
}

void accumulate(std::vector<Tensor> parts, Tensor out, int64_t type, int64_t out_type, int64_t num_threads) {
  mrl::accumulate(addresses(parts).data(), static_cast<int64_t>(parts.size()), out.data_ptr(), out.numel(),
                  static_cast<int>(type), static_cast<int>(out_type), static_cast<int>(num_threads));
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// window 0, softcap 0, no sinks: none.
mrl::ScoreRule score_rule(double scale, int64_t window, double softcap, const Tensor& sinks) {
  return {static_cast<float>(scale), static_cast<float>(softcap), window,
          sinks.numel() == 0 ? nullptr : floats(sinks)};
}

void decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor cache, Tensor positions, Tensor out, double scale,
                      int64_t window, double softcap, Tensor sinks, int64_t num_threads) {
  const int64_t kv_heads = cache.size(1);
  const mrl::DecodeAttention call{floats(qkv),
                                  floats(cos),
                                  floats(sin),
                                  floats(cache),
                                  static_cast<const int64_t*>(positions.data_ptr()),
                                  floats(out),
                                  qkv.size(1) - 2 * kv_heads,
                                  kv_heads,
                                  qkv.size(2),
                                  cache.size(3),
                                  cos.size(2),
                                  score_rule(scale, window, softcap, sinks)};
  mrl::decode_attention(call, qkv.size(0), static_cast<int>(num_threads));
}

void add_rms_norm(Tensor hidden, Tensor delta, Tensor weight, Tensor out, double eps, int64_t num_threads) {
  mrl::add_rms_norm(floats(hidden), floats(delta), floats(weight), floats(out), hidden.size(0), hidden.size(1),
                    static_cast<float>(eps), static_cast<int>(num_threads));
}

mrl::TokenHeads token_heads(const Tensor& tensor) { return {floats(tensor), tensor.stride(0), tensor.stride(1)}; }

// rotary: [2, positions, half], cosines and sines; no positions = no rotation.
mrl::Rotary rotary_of(const Tensor& rotary) {
  if (rotary.size(1) == 0) return {nullptr, nullptr, 0};
  return {floats(rotary), floats(rotary) + rotary.stride(0), rotary.size(2)};
}

mrl::PackedAttention attention_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& rotary,
                                    const Tensor& segments, const Tensor& out, const Tensor& maximum,
                                    const Tensor& inverse, const mrl::ScoreRule& rule) {
  return {token_heads(query),
          token_heads(key),
          token_heads(value),
          rotary_of(rotary),
          static_cast<const mrl::AttentionSegment*>(segments.data_ptr()),
          segments.size(0),
          query.size(1),
          key.size(1),
          query.size(2),
          value.size(2),
          rule,
          floats(out),
          floats(maximum),
          floats(inverse)};
}

void packed_attention(Tensor query, Tensor key, Tensor value, Tensor rotary, Tensor segments, Tensor out,
                      Tensor maximum, Tensor inverse, double scale, int64_t window, double softcap, Tensor sinks,
                      int64_t num_threads) {
  const auto rule = score_rule(scale, window, softcap, sinks);
  mrl::packed_attention(attention_call(query, key, value, rotary, segments, out, maximum, inverse, rule),
                        static_cast<int>(num_threads));
}

void packed_attention_grad(Tensor query, Tensor key, Tensor value, Tensor rotary, Tensor segments, Tensor out,
                           Tensor maximum, Tensor inverse, Tensor grad_out, Tensor grad_query, Tensor grad_key,
                           Tensor grad_value, double scale, int64_t window, double softcap, Tensor sinks,
                           int64_t num_threads) {
  const auto rule = score_rule(scale, window, softcap, sinks);
  const auto forward = attention_call(query, key, value, rotary, segments, out, maximum, inverse, rule);
  mrl::packed_attention_grad({forward, floats(grad_out), floats(grad_query), floats(grad_key), floats(grad_value)},
                             static_cast<int>(num_threads));
}

void swiglu(Tensor x, Tensor out, int64_t num_threads) {
  mrl::swiglu(floats(x), floats(out), out.size(0), out.size(1), static_cast<int>(num_threads));
}

void swiglu_grad(Tensor x, Tensor grad_out, Tensor grad, int64_t num_threads) {
  mrl::swiglu_grad(floats(x), floats(grad_out), floats(grad), grad_out.size(0), grad_out.size(1),
                   static_cast<int>(num_threads));
}

void rms_norm(Tensor x, Tensor weight, Tensor out, Tensor inverse, double eps, int64_t num_threads) {
  mrl::rms_norm(floats(x), floats(weight), floats(out), floats(inverse), x.size(0), x.size(1), static_cast<float>(eps),
                static_cast<int>(num_threads));
}

void rms_norm_grad(Tensor x, Tensor weight, Tensor inverse, Tensor grad_out, Tensor grad, Tensor grad_weight,
                   int64_t num_threads) {
  mrl::rms_norm_grad(floats(x), floats(weight), floats(inverse), floats(grad_out), floats(grad), floats(grad_weight),
                     x.size(0), x.size(1), static_cast<int>(num_threads));
}

template <class T>
void gae_as(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& bounds,
            const Tensor& advantages, const Tensor& returns, double gamma, double lam, int64_t num_threads) {
  mrl::gae(static_cast<const T*>(rewards.data_ptr()), static_cast<const T*>(values.data_ptr()),
           static_cast<const bool*>(mask.data_ptr()), static_cast<const int64_t*>(bounds.data_ptr()),
           bounds.size(0) - 1, gamma, lam, static_cast<T*>(advantages.data_ptr()), static_cast<T*>(returns.data_ptr()),
           static_cast<int>(num_threads));
}

void gae(Tensor rewards, Tensor values, Tensor mask, Tensor bounds, Tensor advantages, Tensor returns, double gamma,
         double lam, int64_t num_threads) {
  const auto run = values.element_size() == 8 ? gae_as<double> : gae_as<float>;
  run(rewards, values, mask, bounds, advantages, returns, gamma, lam, num_threads);
}

mrl::LogitTile logit_tile(const Tensor& logits, const Tensor& targets, int64_t first_row, double temperature) {
  mrl::LogitTile tile{};
  tile.logits = logits.data_ptr();
  tile.targets = static_cast<const int64_t*>(targets.data_ptr());
  tile.width = logits.size(1);
  tile.first_row = first_row;
  tile.temperature = static_cast<float>(temperature);
  return tile;
}

void fold_logits(Tensor logits, Tensor targets, Tensor maximum, Tensor total, Tensor target, Tensor moment,
                 int64_t first_row, double temperature, bool with_entropy, int64_t type, int64_t num_threads) {
  mrl::LogitTile tile = logit_tile(logits, targets, first_row, temperature);
  tile.with_entropy = with_entropy;
  tile.maximum = floats(maximum), tile.total = floats(total), tile.target = floats(target);
  tile.moment = floats(moment);
  mrl::fold_logits(tile, logits.size(0), static_cast<int>(type), static_cast<int>(num_threads));
}

// grad_entropy: [0] where no gradient flows through entropies.
void grad_logits(Tensor logits, Tensor targets, Tensor maximum, Tensor log_total, Tensor grad_logprob,
                 Tensor grad_entropy, Tensor entropy, int64_t first_row, double temperature, int64_t type,
                 int64_t num_threads) {
  mrl::LogitTile tile = logit_tile(logits, targets, first_row, temperature);
  tile.maximum = floats(maximum);
  const mrl::LogitGradient gradient{floats(log_total), floats(grad_logprob),
                                    grad_entropy.size(0) ? floats(grad_entropy) : nullptr, floats(entropy)};
  mrl::grad_logits(tile, gradient, logits.size(0), static_cast<int>(type), static_cast<int>(num_threads));
}

int64_t limit_vector_level(int64_t level) { return mrl::limit_level(static_cast<int>(level)); }

}  // namespace

STABLE_TORCH_LIBRARY(megatron_rl_cpu, library) {
  library.def(
      "copy_spans(Tensor[] sources, Tensor(a!)[] destinations, Tensor jobs, int src_type, int dst_type, "
      "int num_threads) -> ()");
  library.def("block_quantize(Tensor x, Tensor(a!) codes, Tensor(b!) scales, int type, int num_threads) -> ()");
  library.def(
      "span_checksum(Tensor[] tensors, Tensor spans, Tensor(a!) sums, int type, int as_type, int word_bytes, "
      "int num_threads) -> ()");
  library.def("accumulate(Tensor[] parts, Tensor(a!) out, int type, int out_type, int num_threads) -> ()");
  library.def(
      "decode_attention(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) cache, Tensor positions, Tensor(c!) out, "
      "float scale, int window, float softcap, Tensor sinks, int num_threads) -> ()");
  library.def(
      "add_rms_norm(Tensor(a!) hidden, Tensor delta, Tensor weight, Tensor(b!) out, float eps, int num_threads) -> ()");
  library.def(
      "packed_attention(Tensor query, Tensor key, Tensor value, Tensor rotary, Tensor segments, Tensor(a!) out, "
      "Tensor(b!) maximum, Tensor(c!) inverse, float scale, int window, float softcap, Tensor sinks, int num_threads) -> ()");
  library.def(
      "packed_attention_grad(Tensor query, Tensor key, Tensor value, Tensor rotary, Tensor segments, Tensor out, "
      "Tensor maximum, Tensor inverse, Tensor grad_out, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, float scale, int window, float softcap, Tensor sinks, int num_threads) -> ()");
  library.def("swiglu(Tensor x, Tensor(a!) out, int num_threads) -> ()");
  library.def("swiglu_grad(Tensor x, Tensor grad_out, Tensor(a!) grad, int num_threads) -> ()");
  library.def(
      "rms_norm(Tensor x, Tensor weight, Tensor(a!) out, Tensor(b!) inverse, float eps, int num_threads) -> ()");
  library.def(
      "rms_norm_grad(Tensor x, Tensor weight, Tensor inverse, Tensor grad_out, Tensor(a!) grad, "
      "Tensor(b!) grad_weight, int num_threads) -> ()");
  library.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, Tensor bounds, Tensor(a!) advantages, Tensor(b!) returns, "
      "float gamma, float lam, int num_threads) -> ()");
  library.def(
      "fold_logits(Tensor logits, Tensor targets, Tensor(a!) maximum, Tensor(b!) total, Tensor(c!) target, "
      "Tensor(d!) moment, int first_row, float temperature, bool with_entropy, int type, int num_threads) -> ()");
  library.def(
      "grad_logits(Tensor(a!) logits, Tensor targets, Tensor maximum, Tensor log_total, Tensor grad_logprob, "
      "Tensor grad_entropy, Tensor entropy, int first_row, float temperature, int type, int num_threads) -> ()");
  library.def("limit_vector_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl_cpu, CPU, library) {
  library.impl("copy_spans", TORCH_BOX(&copy_spans));
  library.impl("block_quantize", TORCH_BOX(&block_quantize));
  library.impl("span_checksum", TORCH_BOX(&span_checksum));
  library.impl("accumulate", TORCH_BOX(&accumulate));
  library.impl("decode_attention", TORCH_BOX(&decode_attention));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("swiglu", TORCH_BOX(&swiglu));
  library.impl("swiglu_grad", TORCH_BOX(&swiglu_grad));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_grad", TORCH_BOX(&rms_norm_grad));
  library.impl("gae", TORCH_BOX(&gae));
  library.impl("fold_logits", TORCH_BOX(&fold_logits));
  library.impl("grad_logits", TORCH_BOX(&grad_logits));
  library.impl("packed_attention", TORCH_BOX(&packed_attention));
  library.impl("packed_attention_grad", TORCH_BOX(&packed_attention_grad));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_rl_cpu, CompositeExplicitAutograd, library) {
  library.impl("limit_vector_level", TORCH_BOX(&limit_vector_level));
}
