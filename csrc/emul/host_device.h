// CUDA's execution model on the host, so that tests run the kernel bodies without a GPU: every thread of a block is
// a fiber, and barriers and shuffles are real rendezvous among them. One block at a time; correctness only.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define MRL_SHARED static
#define MRL_LAUNCH(KERNEL, GRID, BLOCK, STREAM, ...) \
  (static_cast<void>(STREAM), mrl_host::launch((GRID), (BLOCK), [&] { KERNEL(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace mrl_host {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kDivergentBarrier = 716;  // some threads left the kernel while others wait for them

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> live;
  std::vector<uint64_t> exchange;  // one slot per thread for shuffles
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
};
inline Block block;

inline void enter() {
  block.body();
  block.live[block.current] = 0;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

// A rendezvous: the scheduler comes back to this fiber after every other one has arrived or ended.
inline void wait_for_all() {
  const unsigned self = block.current;
  swapcontext(&block.fibers[self], &block.scheduler);
  threadIdx = dim3(self);
}

inline int run_block(unsigned num_threads) {
  block.live.assign(num_threads, 1);
  for (unsigned t = 0; t < num_threads; ++t) {
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack.ss_sp = block.stacks[t].get();
    block.fibers[t].uc_stack.ss_size = kStackBytes;
    block.fibers[t].uc_link = nullptr;
    makecontext(&block.fibers[t], enter, 0);
  }
  for (unsigned alive = num_threads; alive != 0;) {
    const unsigned before = alive;
    alive = 0;
    for (unsigned t = 0; t < num_threads; ++t) {
      if (!block.live[t]) continue;
      block.current = t;
      threadIdx = dim3(t);
      swapcontext(&block.scheduler, &block.fibers[t]);
      alive += block.live[t];
    }
    if (alive != 0 && alive != before) return kDivergentBarrier;
  }
  return 0;
}

template <class Body>
int launch(dim3 grid, dim3 threads, Body&& body) {
  gridDim = grid;
  blockDim = threads;
  block.body = body;
  block.fibers.resize(threads.x);
  block.exchange.resize(threads.x);
  while (block.stacks.size() < threads.x) block.stacks.emplace_back(new char[kStackBytes]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (const int failure = run_block(threads.x)) return failure;
      }
  return 0;
}

}  // namespace mrl_host

inline void __syncthreads() { mrl_host::wait_for_all(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
  auto& block = mrl_host::block;
  const unsigned self = block.current, peer = self ^ static_cast<unsigned>(mask);
  std::memcpy(&block.exchange[self], &value, sizeof(T));
  mrl_host::wait_for_all();
  T result = value;
  if (peer < block.exchange.size() && peer / 32 == self / 32) std::memcpy(&result, &block.exchange[peer], sizeof(T));
  mrl_host::wait_for_all();
  return result;
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at += value;
  return before;
}
