// The CPU operations, over raw memory. Arguments were validated by the Python interfaces.
#pragma once
#include <cstdint>

#include "tables.h"

namespace mrl {

// src_bytes and dst_bytes: element sizes. Types: NumberType codes; both kRaw copies bits.
void copy_spans(const void* const* sources, void* const* destinations, const CopyJob* jobs, int64_t num_jobs,
                int src_type, int dst_type, int64_t src_bytes, int64_t dst_bytes, int num_threads);

// x: [rows, cols] of NumberType `type`; codes: [rows, cols] e4m3; scales: [ceil(rows / 128), ceil(cols / 128)].
void block_quantize(const void* x, uint8_t* codes, float* scales, int64_t rows, int64_t cols, int type,
                    int num_threads);

// sums[slot] += checksum of each span. word_bytes: 1 or 2 for raw words; otherwise elements of `type` are first cast
// to `as_type`, and each result is one word.
void span_checksum(const void* const* tensors, const ChecksumSpan* spans, int64_t num_spans, int type, int as_type,
                   int word_bytes, uint64_t* sums, int num_threads);

// What becomes of the products of queries and keys before the softmax.
struct ScoreRule {
  float scale, softcap;  // softcap 0: none; else softcap * tanh(scale * product / softcap)
  int64_t window;        // keys that a query sees at most, its own included; 0: all before it
  const float* sinks;    // [heads], a score beside each query's own, without a value; nullptr: none
  int64_t first(int64_t seen) const { return window > 0 && seen > window ? seen - window : 0; }
};

// One layer's attention of one new token per sequence; float32, contiguous.
struct DecodeAttention {
  float* qkv;                // [rows, q_heads + 2 * kv_heads, head_dim]; queries and keys are rotated in place
  const float* cos;          // [rows, rotary_dim], of the first channels
  const float* sin;          // [rows, rotary_dim], negative in the first half
  float* cache;              // [rows or more, kv_heads, 2, length, head_dim]
  const int64_t* positions;  // [rows], below length
  float* out;                // [rows, q_heads, head_dim]
  int64_t q_heads, kv_heads, head_dim, length, rotary_dim;
  ScoreRule rule;
};
void decode_attention(const DecodeAttention& a, int64_t rows, int num_threads);

// hidden, delta, out: [rows, cols]; hidden += delta, out = hidden / rms(hidden) * weight.
void add_rms_norm(float* hidden, const float* delta, const float* weight, float* out, int64_t rows, int64_t cols,
                  float eps, int num_threads);

// Attention over sequences that lie end to end; float32. Segment: its queries are the last of its keys, and causal.
constexpr int64_t kMaxHeadDim = 256;
struct AttentionSegment {
  int64_t first_query, num_queries, first_key, num_keys;
};
struct TokenHeads {  // [tokens, heads, dim], the last dimension contiguous
  const float* data;
  int64_t token, head;  // strides, in elements
  const float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};
struct Rotary {  // [positions, half] each, of the first 2 * half channels; nullptr: all are used as they are
  const float *cos, *sin;
  int64_t half;
};
struct PackedAttention {
  TokenHeads query, key, value;
  Rotary rotary;
  const AttentionSegment* segments;
  int64_t num_segments, heads, groups, dim, value_dim;
  ScoreRule rule;
  float* out;                // [queries, heads, value_dim]
  float *maximum, *inverse;  // [queries, heads]: largest score, and 1 / sum of exp(score - maximum), sinks counted
};
void packed_attention(const PackedAttention& a, int num_threads);

struct PackedAttentionGrad {
  PackedAttention forward;
  const float* grad_out;            // as out
  float* grad_query;                // [queries, heads, dim], written
  float *grad_key, *grad_value;     // [keys, groups, dim], added to
};
void packed_attention_grad(const PackedAttentionGrad& g, int num_threads);

// out = the sum of parts, [n] each, in fp32 and in their order; type, out_type: kFloat32 or kBfloat16.
void accumulate(const void* const* parts, int64_t num_parts, void* out, int64_t n, int type, int out_type,
                int num_threads);

// x: [rows, 2 * width], gates then ups; out: [rows, width]; grad: as x.
void swiglu(const float* x, float* out, int64_t rows, int64_t width, int num_threads);
void swiglu_grad(const float* x, const float* grad_out, float* grad, int64_t rows, int64_t width, int num_threads);

// Generalised advantages over packed sequences: all but bounds are [tokens]; bounds: [num_sequences + 1]. T: float, double.
template <class T>
void gae(const T* rewards, const T* values, const bool* mask, const int64_t* bounds, int64_t num_sequences,
         double gamma, double lam, T* advantages, T* returns, int num_threads);

// A tile of logits, [tokens, width] of NumberType `type`, and its tokens' online softmax, [tokens] each and written by
// fold_logits: largest logit, sum of exp(logit - maximum), the target's logit, sum of exp(..) * (logit - maximum).
struct LogitTile {
  void* logits;  // undivided; grad_logits overwrites them with their gradient
  const int64_t* targets;  // rows of the whole weight; negative: held by another rank
  int64_t width, first_row;
  float temperature;
  bool with_entropy;
  float *maximum, *total, *target, *moment;
};
struct LogitGradient {  // [tokens] each
  const float *log_total, *grad_logprob, *grad_entropy, *entropy;  // grad_entropy nullptr: none flows
};
void fold_logits(const LogitTile& a, int64_t tokens, int type, int num_threads);
void grad_logits(const LogitTile& a, const LogitGradient& g, int64_t tokens, int type, int num_threads);

// x, out, grad_out, grad: [rows, cols]; inverse: [rows], 1 / rms of each; weight, grad_weight: [cols].
void rms_norm(const float* x, const float* weight, float* out, float* inverse, int64_t rows, int64_t cols, float eps,
              int num_threads);
void rms_norm_grad(const float* x, const float* weight, const float* inverse, const float* grad_out, float* grad,
                   float* grad_weight, int64_t rows, int64_t cols, int num_threads);

}  // namespace mrl
