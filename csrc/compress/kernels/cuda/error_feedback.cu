#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/error_feedback.h"

namespace dear::compress::cuda {

namespace {

template <typename T>
__global__ __launch_bounds__(kThreads) void correct_kernel(const T* grad, float* error, int64_t n,
                                                           int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float own[4];
    float kept[4];
    load_four(grad, offset, n, grad_aligned, own);
    load_four(error, offset, n, error_aligned, kept);
    lost += correct_four(own, kept, own);
    store_four(own, error, offset, n, error_aligned);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

}  // namespace

void error_correct(const void* grad, GradType type, float* error, int64_t n, int32_t* dropped,
                   cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    correct_kernel<T><<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(
        static_cast<const T*>(grad), error, n, dropped);
  });
}

}  // namespace dear::compress::cuda
