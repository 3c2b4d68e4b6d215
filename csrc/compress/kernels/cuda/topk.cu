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

__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & ~kSignBit; }

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

// --- Exact threshold

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

// --- Selection

// Step 1: correct the error, note what passes the threshold, count.
template <typename T>
__global__ __launch_bounds__(kThreads) void mark_kernel(const T* grad, float* error, int64_t n,
                                                        const float* threshold, const int32_t* ties,
                                                        int32_t* masks, int32_t* counts, int32_t* stats) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const uint32_t limit = magnitude_bits(*threshold);
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  // All loads come before the first store, behind which the compiler moves none: they may be of the same
  // memory.
  float kept[kGroups][4];
  float own[kGroups][4] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    load_four(error, start + group_offset(group), n, error_aligned, kept[group]);
    if (grad != nullptr) load_four(grad, start + group_offset(group), n, grad_aligned, own[group]);
  }
  int lost = 0;
  int above_or_equal = 0;
  int equal = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float (&values)[4] = kept[group];
    if (grad != nullptr) {
      lost += correct_four(own[group], values, values);
      store_four(values, error, offset, n, error_aligned);
    }
    uint32_t nibble = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = magnitude_bits(values[i]);
      if (offset + i >= n || bits < limit) continue;
      nibble |= 1u << i;
      ++above_or_equal;
      equal += bits == limit ? 1 : 0;
    }
    const uint32_t word = gather_word(nibble);
    if (threadIdx.x % 8 == 0) {
      masks[blockIdx.x * kBlockWords + group_offset(group) / kWordBits] = static_cast<int32_t>(word);
    }
  }
  if (lost != 0) atomicAdd(&stats[1], lost);
  above_or_equal = block_sum<kThreads>(above_or_equal);
  equal = ties == nullptr ? 0 : block_sum<kThreads>(equal);
  if (threadIdx.x == 0) {
    counts[2 * blockIdx.x] = above_or_equal - equal;
    counts[2 * blockIdx.x + 1] = equal;
  }
}

// Step 2, one thread block: how many ties each block takes, and how many entries lie before it in the whole
// group. counts become that number, and the ties to take (negative: all, so nobody needs to look). Then the
// slots' headers.
__global__ __launch_bounds__(kScanThreads) void scan_kernel(int64_t blocks, const int32_t* ties,
                                                            int64_t shard_blocks, int64_t owners,
                                                            int64_t capacity, int32_t* counts,
                                                            int32_t* payload, int32_t* stats) {
  // Each thread has blocks that lie side by side: two scans over the thread block are enough for all of them.
  const int64_t share = ceil_div(blocks, int64_t{kScanThreads});
  const int64_t first_own = threadIdx.x * share;
  const int64_t last_own = min(first_own + share, blocks);
  int above = 0;
  int equal = 0;
  for (int64_t block = first_own; block < last_own; ++block) {
    above += counts[2 * block];
    equal += counts[2 * block + 1];
  }
  int all_equal;
  const int equal_before = block_exclusive_scan<kScanThreads>(equal, &all_equal);
  int ties_left = max(0, (ties == nullptr ? 0 : *ties) - equal_before);
  int before;
  int position = block_exclusive_scan<kScanThreads>(above + min(equal, ties_left), &before);
  for (int64_t block = first_own; block < last_own; ++block) {
    const int own_equal = counts[2 * block + 1];
    const int taken_ties = min(own_equal, ties_left);
    const int taken = counts[2 * block] + taken_ties;
    counts[2 * block] = position;
    counts[2 * block + 1] = taken_ties == own_equal ? -1 : taken_ties;
    ties_left -= taken_ties;
    position += taken;
  }
  __syncthreads();
  for (int64_t owner = threadIdx.x; owner < owners; owner += kScanThreads) {
    const int64_t first = owner * shard_blocks;
    const int64_t last = owner + 1 == owners ? blocks : first + shard_blocks;
    const int begin = first < blocks ? counts[2 * first] : before;
    const int end = last < blocks ? counts[2 * last] : before;
    payload[owner * slot_words(capacity)] =
        static_cast<int32_t>(min(static_cast<int64_t>(end - begin), capacity));
  }
  if (threadIdx.x == 0) stats[0] += before;
}

// Step 3: move the entries. One thread per word of the mask.
__global__ __launch_bounds__(kBlockWords) void move_kernel(float* error, int64_t n, const float* threshold,
                                                           int64_t shard_blocks, int64_t owners,
                                                           int64_t capacity, const int32_t* masks,
                                                           const int32_t* counts, int32_t* payload) {
  const int64_t block = blockIdx.x;
  const int64_t first = block * kBlock + threadIdx.x * kWordBits;
  uint32_t mask = static_cast<uint32_t>(masks[block * kBlockWords + threadIdx.x]);
  const int quota = counts[2 * block + 1];
  int total;
  if (quota >= 0) {
    const uint32_t limit = magnitude_bits(*threshold);
    uint32_t equal = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int bit = __ffs(static_cast<int>(rest)) - 1;
      if (magnitude_bits(error[first + bit]) == limit) equal |= 1u << bit;
    }
    int ties_before = block_exclusive_scan<kBlockWords>(__popc(equal), &total);
    for (uint32_t rest = equal; rest != 0; rest &= rest - 1) {
      if (ties_before++ >= quota) mask &= ~(rest & (~rest + 1));
    }
  }
  const int within = block_exclusive_scan<kBlockWords>(__popc(mask), &total);
  const int64_t owner = owners == 1 ? 0 : block / shard_blocks;
  const int64_t owner_first = owner * shard_blocks;
  int64_t position = counts[2 * block] - counts[2 * owner_first] + within;
  int32_t* indices = payload + owner * slot_words(capacity) + kSlotHeader;
  for (; mask != 0 && position < capacity; mask &= mask - 1, ++position) {
    const int64_t i = first + __ffs(static_cast<int>(mask)) - 1;
    indices[position] = static_cast<int32_t>(i - owner_first * kBlock);
    indices[capacity + position] = __float_as_int(error[i]);
    error[i] = 0;
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

void topk_select(const void* grad, GradType type, float* error, int64_t n, const float* threshold,
                 const int32_t* ties, int64_t shard_numel, int64_t owners, int64_t capacity, int32_t* payload,
                 int32_t* stats, int32_t* workspace, cudaStream_t stream) {
  const TopkWorkspace space(workspace, n);
  const int64_t blocks = block_count(n);
  const int64_t shard_blocks = owners == 1 ? blocks : shard_numel / kBlock;
  const auto grid = static_cast<unsigned>(blocks);
  if (blocks > 0) {
    dispatch(type, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      mark_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(grad), error, n, threshold, ties,
                                                    space.masks, space.counts, stats);
    });
  }
  scan_kernel<<<1, kScanThreads, 0, stream>>>(blocks, ties, shard_blocks, owners, capacity, space.counts,
                                              payload, stats);
  if (blocks > 0) {
    move_kernel<<<grid, static_cast<unsigned>(kBlockWords), 0, stream>>>(
        error, n, threshold, shard_blocks, owners, capacity, space.masks, space.counts, payload);
  }
}

}  // namespace dear::compress::cuda
