#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/segments.h"

namespace dear::compress::cuda {

namespace {

// The host knows the number of segments and how long they are together, not how long each is. So many thread
// blocks share one segment; those that find nothing to do return at once.
constexpr int64_t kMaxShare = 64;

__device__ Segment checked(const Segment* segments, int64_t numel, int64_t message_numel) {
  const Segment segment = segments[blockIdx.x];
  if (!segment.within(numel, message_numel)) __trap();
  return segment;
}

template <typename T>
__global__ __launch_bounds__(kThreads) void gather_kernel(const T* source, int64_t numel,
                                                          const Segment* segments, float* message,
                                                          int64_t message_numel, int32_t* dropped) {
  const Segment segment = checked(segments, numel, message_numel);
  const T* from = source + segment.start;
  float* to = message + segment.position;
  const bool from_aligned = vector_aligned(from);
  const bool to_aligned = vector_aligned(to);
  int lost = 0;
  for (int64_t start = blockIdx.y * kBlock; start < segment.numel; start += gridDim.y * kBlock) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t offset = start + group_offset(group);
      float values[4];
      load_four(from, offset, segment.numel, from_aligned, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) lost += is_finite(values[i]) ? 0 : 1;  // what does not exist reads as 0
      store_four(values, to, offset, segment.numel, to_aligned);
    }
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void scatter_kernel(const float* message, int64_t message_numel,
                                                           const Segment* segments, T* out, int64_t numel) {
  const Segment segment = checked(segments, numel, message_numel);
  const float* from = message + segment.position;
  T* to = out + segment.start;
  const bool from_aligned = vector_aligned(from);
  const bool to_aligned = vector_aligned(to);
  for (int64_t start = blockIdx.y * kBlock; start < segment.numel; start += gridDim.y * kBlock) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t offset = start + group_offset(group);
      float values[4];
      load_four(from, offset, segment.numel, from_aligned, values);
      store_four(values, to, offset, segment.numel, to_aligned);
    }
  }
}

dim3 grid_of(int64_t count, int64_t message_numel) {
  const int64_t share = block_count(message_numel) < kMaxShare ? block_count(message_numel) : kMaxShare;
  return {static_cast<unsigned>(count), static_cast<unsigned>(share)};
}

}  // namespace

void gather_segments(const void* source, GradType type, int64_t numel, const Segment* segments, int64_t count,
                     float* message, int64_t message_numel, int32_t* dropped, cudaStream_t stream) {
  if (count == 0 || message_numel == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    gather_kernel<T><<<grid_of(count, message_numel), kThreads, 0, stream>>>(
        static_cast<const T*>(source), numel, segments, message, message_numel, dropped);
  });
}

void scatter_segments(const float* message, int64_t message_numel, const Segment* segments, int64_t count,
                      GradType type, void* out, int64_t numel, cudaStream_t stream) {
  if (count == 0 || message_numel == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    scatter_kernel<T><<<grid_of(count, message_numel), kThreads, 0, stream>>>(
        message, message_numel, segments, static_cast<T*>(out), numel);
  });
}

}  // namespace dear::compress::cuda
