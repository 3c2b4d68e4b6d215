#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/dense.h"

namespace dear::compress::cuda {

namespace {

// Rounds four values, with the error where there is one; returns how many elements were dropped or are not
// finite.
template <typename U>
__device__ __forceinline__ int round_four(float (&values)[4], float* error, bool error_aligned,
                                          int64_t offset, int64_t n, U* out, bool out_aligned) {
  int lost = 0;
  if (error == nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      U rounded;
      from_float(values[i], &rounded);
      lost += is_finite(to_float(rounded)) ? 0 : 1;  // what does not exist reads as 0
    }
  } else {
    const float limit = largest_of(out);
    float kept[4];
    load_four(error, offset, n, error_aligned, kept);
    lost = correct_four(values, kept, kept);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      U rounded;
      values[i] = fminf(fmaxf(kept[i], -limit), limit);
      from_float(values[i], &rounded);
      kept[i] -= to_float(rounded);
    }
    store_four(kept, error, offset, n, error_aligned);
  }
  store_four(values, out, offset, n, out_aligned);
  return lost;
}

template <typename T, typename U>
__global__ __launch_bounds__(kThreads) void round_kernel(const T* grad, float* error, int64_t n, U* out,
                                                         int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  const bool out_aligned = vector_aligned(out);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float values[4];
    load_four(grad, offset, n, grad_aligned, values);
    lost += round_four(values, error, error_aligned, offset, n, out, out_aligned);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename U>
__global__ __launch_bounds__(kThreads) void average_kernel(const U* payloads, int64_t ranks, int64_t stride,
                                                           float scale, float* error, int64_t n, U* out,
                                                           int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const bool error_aligned = vector_aligned(error);
  const bool out_aligned = vector_aligned(out);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float mean[4] = {};
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const U* payload = payloads + rank * stride;
      float values[4];
      load_four(payload, offset, n, vector_aligned(payload), values);
#pragma unroll
      for (int i = 0; i < 4; ++i) mean[i] += scale * values[i];  // exact, fused or not
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[i] /= static_cast<float>(ranks) * scale;
    lost += round_four(mean, error, error_aligned, offset, n, out, out_aligned);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

// Calls the launcher for the 16-bit type.
template <typename Body>
void dispatch_narrow(GradType type, const Body& body) {
  type == GradType::kFloat16 ? body(static_cast<__half*>(nullptr))
                             : body(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace

void dense_round(const void* grad, GradType type, float* error, int64_t n, GradType out_type, void* out,
                 int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  const auto grid = static_cast<unsigned>(block_count(n));
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_narrow(out_type, [&](auto* narrow) {
      using U = std::remove_pointer_t<decltype(narrow)>;
      round_kernel<T, U><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(grad), error, n,
                                                        static_cast<U*>(out), dropped);
    });
  });
}

void dense_average(const void* payloads, GradType type, int64_t ranks, int64_t stride, float* error,
                   int64_t n, void* out, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  dispatch_narrow(type, [&](auto* narrow) {
    using U = std::remove_pointer_t<decltype(narrow)>;
    average_kernel<U><<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(
        static_cast<const U*>(payloads), ranks, stride, average_scale(ranks), error, n, static_cast<U*>(out),
        dropped);
  });
}

}  // namespace dear::compress::cuda
