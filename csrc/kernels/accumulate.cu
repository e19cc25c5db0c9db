// accumulate: one pack of neighbouring elements per thread, summed over the parts in their order; every part is read
// once. A thread has read its elements of all parts before it writes, so `out` may be one of them.
#include "device.h"
#include "launchers.h"
#include "numbers.h"

namespace mrl {
namespace {

template <class S, class D, int N>
__device__ __forceinline__ void sum_pack(const void* const* parts, int64_t num_parts, D* out, int64_t at) {
  float sums[N];
#pragma unroll
  for (int k = 0; k < N; ++k) sums[k] = 0.0f;
  for (int64_t p = 0; p < num_parts; ++p) {
    const Pack<S, N> in = *reinterpret_cast<const Pack<S, N>*>(static_cast<const S*>(parts[p]) + at);
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] = p == 0 ? Cast<float>::from(in.v[k]) : sums[k] + Cast<float>::from(in.v[k]);
  }
  Pack<D, N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) result.v[k] = Cast<D>::from(sums[k]);
  *reinterpret_cast<Pack<D, N>*>(out + at) = result;
}

template <class S, class D>
constexpr int kPackOf = 16 / (sizeof(S) < sizeof(D) ? sizeof(S) : sizeof(D));

template <class S, class D>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const void* const* parts, int64_t num_parts, D* out, int64_t n, bool aligned) {
  constexpr int kPack = kPackOf<S, D>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (aligned && first + kPack <= n) {
    sum_pack<S, D, kPack>(parts, num_parts, out, first);
  } else {
    for (int64_t at = first; at < first + kPack && at < n; ++at) sum_pack<S, D, 1>(parts, num_parts, out, at);
  }
}

template <class S, class D>
int run(const void* const* parts, int64_t num_parts, void* out, int64_t n, bool aligned, void* stream) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kPackOf<S, D>;
  const dim3 grid(static_cast<unsigned>((n + per_block - 1) / per_block)), threads(kThreads);
  return MRL_LAUNCH((accumulate_kernel<S, D>), grid, threads, stream, parts, num_parts, static_cast<D*>(out), n,
                    aligned);
}

}  // namespace
}  // namespace mrl

int mrl_accumulate(const void* const* parts, int64_t num_parts, void* out, int64_t n, int type, int out_type,
                   bool aligned, void* stream) {
  using namespace mrl;
  switch (type * 4 + out_type) {
    case kFloat32 * 4 + kFloat32: return run<float, float>(parts, num_parts, out, n, aligned, stream);
    case kFloat32 * 4 + kBfloat16: return run<float, Bf16>(parts, num_parts, out, n, aligned, stream);
    case kBfloat16 * 4 + kFloat32: return run<Bf16, float>(parts, num_parts, out, n, aligned, stream);
    case kBfloat16 * 4 + kBfloat16: return run<Bf16, Bf16>(parts, num_parts, out, n, aligned, stream);
    default: return 1;  // cudaErrorInvalidValue
  }
}
