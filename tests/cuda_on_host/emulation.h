// What the CUDA sources need of CUDA, on the host: each thread of a block is a fiber, and they take turns at
// barriers and at what the lanes of a warp tell each other. One block runs after another. So the logic of the
// kernels is tested where no GPU is; races, timing and the GPU's own rounding are not.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;  // bytes

struct Barrier {
  unsigned members = 0;
  unsigned waiting = 0;
  unsigned generation = 0;
};

// The threads of a block, on one thread of the host.
class Block {
 public:
  static Block& current() {
    static thread_local Block block;
    return block;
  }

  void run(unsigned threads, const std::function<void()>& kernel) {
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    kernel_ = &kernel;
    all_ = Barrier{threads};
    warps_.assign((threads + kWarp - 1) / kWarp, Barrier{});
    for (unsigned i = 0; i < threads; ++i) {
      ++warps_[i / kWarp].members;
      fibers_[i]->ended = false;
    }
    for (unsigned left = threads; left > 0;) {
      const unsigned before = left;
      moved_ = false;
      for (unsigned i = 0; i < threads; ++i) {
        if (fibers_[i]->ended) continue;
        number_ = i;
        threadIdx.x = i;
        enter(*fibers_[i]);
        if (fibers_[i]->ended) --left;
      }
      if (left == before && !moved_) {
        std::fputs("The threads of a block wait for each other at different barriers.\n", stderr);
        std::abort();
      }
    }
  }

  void wait_for_all() { wait(all_); }

  // The values that the lanes of this thread's warp bring, each as eight bytes.
  template <typename T, typename Use>
  auto tell_warp(T value, const Use& use) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    fibers_[number_]->told = bits;
    Barrier& warp = warps_[number_ / kWarp];
    wait(warp);
    const auto found = use([this](unsigned lane) {
      T of_lane;
      std::memcpy(&of_lane, &fibers_[number_ / kWarp * kWarp + lane]->told, sizeof(T));
      return of_lane;
    });
    wait(warp);  // all have read
    return found;
  }

  int count(bool own) {
    counted_ += own ? 1 : 0;
    wait(all_);
    const int found = counted_;
    wait(all_);
    counted_ -= own ? 1 : 0;  // all do before the next barrier
    return found;
  }

  unsigned lane() const { return number_ % kWarp; }

 private:
  struct Fiber {
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    uint64_t told = 0;
    bool ended = true;
  };

  // A fiber begins in a context of its own. From then on jumps, which ask nothing of the kernel, are enough:
  // it lives on from block to block.
  void enter(Fiber& fiber) {
    if (_setjmp(back_) != 0) return;
    if (fiber.stack) _longjmp(fiber.place, 1);
    fiber.stack.reset(new char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Block::live, 0);
    setcontext(&context);
  }
  static void live() {
    Block& block = current();
    for (;;) {
      (*block.kernel_)();
      block.leave(block.all_);
      block.leave(block.warps_[block.number_ / kWarp]);
      block.fibers_[block.number_]->ended = true;
      block.yield();
    }
  }
  void yield() {
    if (_setjmp(fibers_[number_]->place) == 0) _longjmp(back_, 1);
  }

  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++barrier.waiting;
    open(barrier);
    while (barrier.generation == generation) yield();
  }
  void leave(Barrier& barrier) {
    --barrier.members;
    if (barrier.members > 0) open(barrier);
  }
  void open(Barrier& barrier) {
    if (barrier.waiting < barrier.members) return;
    barrier.waiting = 0;
    ++barrier.generation;
    moved_ = true;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Barrier> warps_;
  Barrier all_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf back_;
  unsigned number_ = 0;
  int counted_ = 0;
  bool moved_ = false;
};

// kernel<<<grid, threads, shared, stream>>>(...), as translate.py writes it.
inline void launch(dim3 grid, dim3 threads, size_t, void*, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = threads;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) Block::current().run(threads.x, kernel);
    }
  }
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T, typename Fold>
T fold_warp(T value, const Fold& fold) {
  return Block::current().tell_warp(value, [&](const auto& of) {
    T total = of(0);
    for (unsigned lane = 1; lane < kWarp; ++lane) total = fold(total, of(lane));
    return total;
  });
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::current().wait_for_all(); }
inline int __syncthreads_count(int own) { return emulated::Block::current().count(own != 0); }
[[noreturn]] inline void __trap() { std::abort(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  auto& block = emulated::Block::current();
  return block.tell_warp(value, [&](const auto& of) { return of(block.lane() ^ unsigned(distance)); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  auto& block = emulated::Block::current();
  const unsigned from = block.lane() < unsigned(distance) ? block.lane() : block.lane() - distance;
  return block.tell_warp(value, [&](const auto& of) { return of(from); });
}
inline uint32_t __ballot_sync(unsigned, int own) {
  return emulated::Block::current().tell_warp(own, [](const auto& of) {
    uint32_t set = 0;
    for (unsigned lane = 0; lane < emulated::kWarp; ++lane) set |= uint32_t{of(lane) != 0} << lane;
    return set;
  });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return emulated::fold_warp(value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return emulated::fold_warp(value, [](T a, T b) { return T(a + b); });
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  if (value < before) *at = value;
  return before;
}

inline uint32_t __float_as_uint(float value) { return emulated::bits<uint32_t>(value); }
inline int32_t __float_as_int(float value) { return emulated::bits<int32_t>(value); }
inline float __uint_as_float(uint32_t value) { return emulated::bits<float>(value); }
inline float __int_as_float(int32_t value) { return emulated::bits<float>(value); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset2DAsync(void* at, size_t pitch, int value, size_t width, size_t height,
                                     cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(at) + row * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}
