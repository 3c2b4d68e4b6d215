// The owners' merge of sparse payloads, and their decoding.
#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/topk.h"

namespace dear::compress::cuda {

namespace {

__device__ int64_t slot_count(const int32_t* slot, int64_t capacity) {
  return min(max(static_cast<int64_t>(slot[0]), int64_t{0}), capacity);
}

// The first entry whose index is at least `index`; entries are sorted. The lanes of a warp search together,
// at 32 places at a time: a search waits for memory as often as it has rounds.
__device__ int64_t lower_bound(const int32_t* indices, int64_t count, int64_t index) {
  int64_t low = 0;
  while (low < count) {
    const int64_t step = ceil_div(count - low, int64_t{32});
    const int64_t place = low + threadIdx.x % 32 * step;
    const int before = __popc(__ballot_sync(kAllLanes, place < count && indices[place] < index));
    if (before == 0) break;
    low += (before - 1) * step;  // this one is before it; the next place, if there is one, is not
    count = min(count, low + step);
    ++low;
  }
  return low;
}

constexpr int kWarps = kThreads / 32;
constexpr int kListsAtOnce = kWarps / 2;

// Calls visit(index, value) for the entries of up to kListsAtOnce slots with first <= index < last, whatever
// they hold, one slot after another. Each warp searches one end of one slot, all at the same time. All
// threads must call it.
template <typename Visit>
__device__ void for_entries(const int32_t* slots, int lists, int64_t capacity, int64_t first, int64_t last,
                            const Visit& visit) {
  __shared__ int64_t ends[kWarps];
  const int warp = threadIdx.x / 32;
  __syncthreads();  // the previous call's readers are done, and so are stores to what is visited
  if (warp < 2 * lists) {
    const int32_t* slot = slots + warp / 2 * slot_words(capacity);
    const int64_t end =
        lower_bound(slot + kSlotHeader, slot_count(slot, capacity), warp % 2 == 0 ? first : last);
    if (threadIdx.x % 32 == 0) ends[warp] = end;
  }
  __syncthreads();
  for (int list = 0; list < lists; ++list) {
    const int32_t* indices = slots + list * slot_words(capacity) + kSlotHeader;
    for (int64_t entry = ends[2 * list] + threadIdx.x; entry < ends[2 * list + 1]; entry += kThreads) {
      const int64_t index = indices[entry];
      if (index >= first && index < last) visit(index, __int_as_float(indices[capacity + entry]));
    }
    if (list + 1 < lists) __syncthreads();
  }
}

__global__ __launch_bounds__(kThreads) void accumulate_kernel(const int32_t* payloads, int64_t lists,
                                                              int64_t capacity, float alpha, float* dense,
                                                              int64_t n, int32_t* dropped) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int64_t last = min(first + kBlock, n);
  for (int64_t list = 0; list < lists; list += kListsAtOnce) {
    const int now = static_cast<int>(min(lists - list, int64_t{kListsAtOnce}));
    // Indices are unique within a list, and lists are kept apart: every sum runs in list order.
    for_entries(payloads + list * slot_words(capacity), now, capacity, first, last,
                [&](int64_t index, float value) {
                  // Not fused: rounded twice, as on a CPU.
                  const float sum = __fadd_rn(dense[index], __fmul_rn(alpha, value));
                  if (is_finite(sum)) {
                    dense[index] = sum;
                  } else if (dropped != nullptr) {
                    atomicAdd(dropped, 1);
                  }
                });
  }
}

// The same as lower_bound, by all threads of a block. The first look is around where the entry would be if
// the indices were evenly spread over `length`: seldom are more than two needed.
__device__ int64_t block_lower_bound(const int32_t* indices, int64_t count, int64_t index, int64_t length) {
  constexpr int64_t kFirstStep = 16;
  int64_t low = 0;
  int64_t high = count;
  int64_t step = min(kFirstStep, ceil_div(count, int64_t{kThreads}));
  int64_t base = max(min(count * index / length, count) - kThreads / 2 * step, int64_t{0});
  while (low < high) {
    const int64_t place = base + threadIdx.x * step;
    const int before = __syncthreads_count(place < high && indices[place] < index ? 1 : 0);
    if (before == 0) {
      high = base;
    } else {
      low = base + (before - 1) * step + 1;
      high = before == kThreads ? high : min(high, base + before * step);
    }
    base = low;
    step = ceil_div(high - low, int64_t{kThreads});
  }
  return low;
}

template <typename T>
__global__ __launch_bounds__(kThreads) void scatter_kernel(const int32_t* payloads, int64_t owners,
                                                           int64_t capacity, int64_t shard_numel, float alpha,
                                                           T* out, int64_t n) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const bool aligned = vector_aligned(out);
  const float zeros[4] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    store_four(zeros, out, start + group_offset(group), n, aligned);
  const int64_t owner = owners == 1 ? 0 : start / shard_numel;
  const int64_t base = owner * shard_numel;
  T* shard = out + base;
  const int32_t* slot = payloads + owner * slot_words(capacity);
  const int32_t* indices = slot + kSlotHeader;
  const int64_t count = slot_count(slot, capacity);
  const int64_t first = start - base;
  const int64_t last = min(start + kBlock, n) - base;
  int64_t entry = block_lower_bound(indices, count, first, shard_numel) + threadIdx.x;
  __syncthreads();  // the zeros are written
  for (; entry < count; entry += kThreads) {
    const int64_t index = indices[entry];
    const float value =
        __int_as_float(indices[capacity + entry]);  // asked for before it is known to be wanted
    if (index < first || index >= last) break;
    from_float(held(alpha * value, out), &shard[index]);
  }
}

}  // namespace

void topk_accumulate(const int32_t* payloads, int64_t lists, int64_t capacity, float alpha, float* dense,
                     int64_t n, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  accumulate_kernel<<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(payloads, lists, capacity,
                                                                                    alpha, dense, n, dropped);
}

void topk_decode(const int32_t* payloads, int64_t owners, int64_t capacity, int64_t shard_numel, float alpha,
                 GradType type, void* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    scatter_kernel<T><<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(
        payloads, owners, capacity, shard_numel, alpha, static_cast<T*>(out), n);
  });
}

}  // namespace dear::compress::cuda
