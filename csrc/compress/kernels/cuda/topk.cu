// The exact k-th largest magnitude, by radix selection.
#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/topk.h"

namespace dear::compress::cuda {

namespace {

// The 31 bits of a magnitude in three digits, most significant first.
template <int kDigit>
struct Digit {
  static constexpr int kShift = kDigit == 0 ? 20 : kDigit == 1 ? 10 : 0;
  static constexpr int kBits = kDigit == 0 ? 11 : 10;
};

constexpr int kScanThreads = 1024;

// The four elements of a group of this thread, with the gradient added where there is one.
template <typename T>
__device__ __forceinline__ void load_sum(const T* grad, bool grad_aligned, const float* error,
                                         bool error_aligned, int64_t offset, int64_t n, float (&values)[4]) {
  load_four(error, offset, n, error_aligned, values);
  if (grad == nullptr) return;
  float own[4];
  load_four(grad, offset, n, grad_aligned, own);
  correct_four(own, values, values);
}

// Of how many selected elements a threshold that stands is kept: none at all when low > high.
struct Kept {
  uint32_t low;
  uint32_t high;

  __device__ bool keeps(const uint32_t* state) const { return low <= state[2] && state[2] <= high; }
};

template <typename T>
__global__ __launch_bounds__(kThreads) void count_kernel(const T* grad, const float* error, int64_t n,
                                                         const float* threshold, uint32_t* state) {
  const uint32_t limit = magnitude_bits(*threshold);
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  int count = 0;
  for (int64_t start = blockIdx.x * kBlock; start < n; start += gridDim.x * kBlock) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t offset = start + group_offset(group);
      float values[4];
      load_sum(grad, grad_aligned, error, error_aligned, offset, n, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) count += offset + i < n && magnitude_bits(values[i]) >= limit ? 1 : 0;
    }
  }
  count = block_sum<kThreads>(count);
  if (threadIdx.x == 0 && count != 0) atomicAdd(&state[2], static_cast<uint32_t>(count));
}

template <typename T, int kDigit>
__global__ __launch_bounds__(kThreads) void histogram_kernel(const T* grad, const float* error, int64_t n,
                                                             const uint32_t* state, Kept kept,
                                                             uint32_t* histogram) {
  using D = Digit<kDigit>;
  if (kept.keeps(state)) return;
  __shared__ uint32_t local[1 << D::kBits];
  for (int bin = threadIdx.x; bin < 1 << D::kBits; bin += kThreads) local[bin] = 0;
  __syncthreads();
  const uint32_t prefix = kDigit == 0 ? 0 : state[0];
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  for (int64_t start = blockIdx.x * kBlock; start < n; start += gridDim.x * kBlock) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t offset = start + group_offset(group);
      float values[4];
      load_sum(grad, grad_aligned, error, error_aligned, offset, n, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = magnitude_bits(values[i]);
        const bool counts = kDigit == 0 || bits >> (D::kShift + D::kBits) == prefix;
        if (counts && offset + i < n) atomicAdd(&local[(bits >> D::kShift) & ((1u << D::kBits) - 1)], 1u);
      }
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < 1 << D::kBits; bin += kThreads) {
    if (local[bin] != 0) atomicAdd(&histogram[bin], local[bin]);
  }
}

// One thread block: the bin in which the wanted rank falls, counted from the largest, becomes the next digit.
template <int kDigit>
__global__ __launch_bounds__(kScanThreads) void pick_kernel(const uint32_t* histogram, uint32_t k, Kept kept,
                                                            uint32_t* state, float* threshold,
                                                            int32_t* ties) {
  using D = Digit<kDigit>;
  if (kept.keeps(state)) return;
  constexpr int kPerThread = (1 << D::kBits) / kScanThreads;
  const uint32_t wanted = kDigit == 0 ? k : state[1];
  const uint32_t prefix = kDigit == 0 ? 0 : state[0];
  int own = 0;
  const int top = (1 << D::kBits) - 1 - static_cast<int>(threadIdx.x) * kPerThread;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) own += static_cast<int>(histogram[top - i]);
  int total;
  auto above = static_cast<uint32_t>(block_exclusive_scan<kScanThreads>(own, &total));
  if (above >= wanted || above + own < wanted) return;  // the scan has synchronised: state was read by all
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t count = histogram[top - i];
    if (above + count >= wanted) {
      const uint32_t found = prefix << D::kBits | static_cast<uint32_t>(top - i);
      state[0] = found;
      state[1] = wanted - above;
      if (kDigit == 2) {
        *threshold = __uint_as_float(found);
        *ties = static_cast<int32_t>(wanted - above);
      }
      return;
    }
    above += count;
  }
}

// Enough thread blocks to fill any device.
unsigned device_grid(int64_t n) {
  return static_cast<unsigned>(block_count(n) < 1024 ? block_count(n) : 1024);
}

template <typename T, int kDigit>
void launch_digit(const T* grad, const float* error, int64_t n, int64_t k, Kept kept, float* threshold,
                  int32_t* ties, const TopkWorkspace& space, cudaStream_t stream) {
  // Each thread block flushes its histogram once.
  const unsigned grid = device_grid(n);
  uint32_t* histogram = space.histogram + kDigit * kHistogramBins;
  histogram_kernel<T, kDigit><<<grid, kThreads, 0, stream>>>(grad, error, n, space.state, kept, histogram);
  pick_kernel<kDigit><<<1, kScanThreads, 0, stream>>>(histogram, static_cast<uint32_t>(k), kept, space.state,
                                                      threshold, ties);
}

template <typename T>
void launch_digits(const T* grad, const float* error, int64_t n, int64_t k, Kept kept, float* threshold,
                   int32_t* ties, const TopkWorkspace& space, cudaStream_t stream) {
  launch_digit<T, 0>(grad, error, n, k, kept, threshold, ties, space, stream);
  launch_digit<T, 1>(grad, error, n, k, kept, threshold, ties, space, stream);
  launch_digit<T, 2>(grad, error, n, k, kept, threshold, ties, space, stream);
}

}  // namespace

void topk_threshold(const void* grad, GradType type, const float* error, int64_t n, int64_t k,
                    float* threshold, int32_t* ties, int32_t* workspace, cudaStream_t stream) {
  const TopkWorkspace space(workspace, n);
  cudaMemsetAsync(space.histogram, 0, kHistogramWords * sizeof(uint32_t), stream);
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch_digits(static_cast<const T*>(grad), error, n, k, Kept{1, 0}, threshold, ties, space, stream);
  });
}

void topk_refresh(const void* grad, GradType type, const float* error, int64_t n, int64_t k, int64_t slack,
                  float* threshold, int32_t* ties, int32_t* workspace, cudaStream_t stream) {
  const TopkWorkspace space(workspace, n);
  cudaMemsetAsync(space.histogram, 0, kHistogramWords * sizeof(uint32_t), stream);
  const Kept kept{static_cast<uint32_t>(k - slack), static_cast<uint32_t>(k + slack)};
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto* values = static_cast<const T*>(grad);
    count_kernel<T><<<device_grid(n), kThreads, 0, stream>>>(values, error, n, threshold, space.state);
    launch_digits(values, error, n, k, kept, threshold, ties, space, stream);
  });
}

}  // namespace dear::compress::cuda
