// gae: one backward pass over each sequence, in double; sequences are shared out over threads.
#include "ops.h"

namespace mrl {
namespace {

template <class T>
void scan(const T* rewards, const T* values, const bool* mask, int64_t start, int64_t stop, double gamma, double lam,
          T* advantages, T* returns) {
  double next_value = 0.0, next_advantage = 0.0;  // of the next step; observations are not steps
  for (int64_t t = stop - 1; t >= start; --t) {
    if (!mask[t]) {
      advantages[t] = returns[t] = T(0);
      continue;
    }
    const double value = static_cast<double>(values[t]);
    const double delta = static_cast<double>(rewards[t]) + gamma * next_value - value;
    next_advantage = delta + gamma * lam * next_advantage;
    next_value = value;
    advantages[t] = static_cast<T>(next_advantage);
    returns[t] = static_cast<T>(next_advantage + value);
  }
}

}  // namespace

template <class T>
void gae(const T* rewards, const T* values, const bool* mask, const int64_t* bounds, int64_t num_sequences,
         double gamma, double lam, T* advantages, T* returns, int num_threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(num_threads) if (num_threads > 1)
  for (int64_t s = 0; s < num_sequences; ++s)
    scan(rewards, values, mask, bounds[s], bounds[s + 1], gamma, lam, advantages, returns);
}

template void gae<float>(const float*, const float*, const bool*, const int64_t*, int64_t, double, double, float*,
                         float*, int);
template void gae<double>(const double*, const double*, const bool*, const int64_t*, int64_t, double, double, double*,
                          double*, int);

}  // namespace mrl
