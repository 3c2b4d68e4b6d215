// The selection of what passes a threshold.
#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/topk.h"

namespace dear::compress::cuda {

namespace {

// How many elements of a block lie above the threshold, and how many are equal to it. These are counted apart
// only where not all of them are taken.
constexpr int kEqualShift = 16;
static_assert(kBlock < 1 << kEqualShift);

// The same of many blocks: the lower half counts those above, the upper half the equal ones.
struct Counts {
  uint64_t both = 0;

  __device__ int64_t equal() const { return static_cast<int64_t>(both >> 32); }
  __device__ int64_t taken(int64_t ties) const {
    return static_cast<int64_t>(both & 0xffffffffu) + min(equal(), ties);
  }
  __device__ void add(uint32_t counts) {
    both += static_cast<uint64_t>(counts >> kEqualShift) << 32 | (counts & ((1u << kEqualShift) - 1));
  }
};

// Step 1: correct the error, note what passes the threshold, count.
template <typename T>
__global__ __launch_bounds__(kThreads) void mark_kernel(const T* grad, float* error, int64_t n,
                                                        const float* threshold, const int32_t* ties,
                                                        uint32_t* masks, uint32_t* counts, int32_t* stats) {
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
    if (threadIdx.x % 8 == 0) masks[blockIdx.x * kBlockWords + group_offset(group) / kWordBits] = word;
  }
  if (lost != 0) atomicAdd(&stats[1], lost);
  above_or_equal = block_sum<kThreads>(above_or_equal);
  equal = ties == nullptr ? 0 : block_sum<kThreads>(equal);
  if (threadIdx.x == 0)
    counts[blockIdx.x] = static_cast<uint32_t>((above_or_equal - equal) | equal << kEqualShift);
}

// The counts of these blocks. All threads must call it.
__device__ Counts sum_of(const uint32_t* counts, int64_t first, int64_t last) {
  Counts own;
#pragma unroll 8
  for (int64_t block = first + threadIdx.x; block < last; block += kBlockWords) own.add(counts[block]);
  own.both = block_sum<kBlockWords>(own.both);
  return own;
}

// The elements of a mask without those equal to the threshold that come behind the first `quota` of them. All
// threads must call it.
__device__ uint32_t without_ties(uint32_t mask, const float* error, uint32_t limit, int quota) {
  uint32_t equal = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int bit = __ffs(static_cast<int>(rest)) - 1;
    if (magnitude_bits(error[bit]) == limit) equal |= 1u << bit;
  }
  int total;
  int ties_before = block_exclusive_scan<kBlockWords>(__popc(equal), &total);
  for (uint32_t rest = equal; rest != 0; rest &= rest - 1) {
    if (ties_before++ >= quota) mask &= ~(rest & (~rest + 1));
  }
  return mask;
}

// Step 2: move the entries of `share` blocks, one thread per word of a block's mask. Where they go depends on
// the counts of all blocks before: every thread block adds those up for itself, which is sooner done than
// waiting for another kernel that does it for all.
__global__ __launch_bounds__(kBlockWords) void move_kernel(float* error, int64_t blocks, int64_t share,
                                                           const float* threshold, const int32_t* ties,
                                                           int64_t shard_blocks, int64_t owners,
                                                           int64_t capacity, const uint32_t* masks,
                                                           const uint32_t* counts, int32_t* payload,
                                                           int32_t* stats) {
  // From the last to the first: what step 1 wrote last is in the cache yet.
  const int64_t begin = (gridDim.x - 1 - blockIdx.x) * share;
  const int64_t end = min(begin + share, blocks);
  const uint32_t limit = magnitude_bits(*threshold);
  const int64_t all_ties = ties == nullptr ? 0 : *ties;
  int64_t owner = owners == 1 ? 0 : begin / shard_blocks;
  Counts before_owner = sum_of(counts, 0, owner * shard_blocks);
  Counts before = before_owner;
  before.both += sum_of(counts, owner * shard_blocks, begin).both;
  for (int64_t block = begin; block < end; ++block) {
    if (owner + 1 < owners && block == (owner + 1) * shard_blocks) {
      ++owner;
      before_owner = before;
    }
    const int64_t first = block * kBlock + threadIdx.x * kWordBits;
    uint32_t mask = masks[block * kBlockWords + threadIdx.x];
    Counts own;
    own.add(counts[block]);
    const int64_t quota = max(all_ties - before.equal(), int64_t{0});
    if (quota < own.equal()) mask = without_ties(mask, error + first, limit, static_cast<int>(quota));
    int total;
    const int within = block_exclusive_scan<kBlockWords>(__popc(mask), &total);
    const int64_t start = before.taken(all_ties) - before_owner.taken(all_ties);
    int32_t* slot = payload + owner * slot_words(capacity);
    int32_t* indices = slot + kSlotHeader;
    int64_t position = start + within;
    for (; mask != 0 && position < capacity; mask &= mask - 1, ++position) {
      const int64_t i = first + __ffs(static_cast<int>(mask)) - 1;
      indices[position] = static_cast<int32_t>(i - owner * shard_blocks * kBlock);
      indices[capacity + position] = __float_as_int(error[i]);
      error[i] = 0;
    }
    before.both += own.both;
    const bool last = block + 1 == blocks;
    if (threadIdx.x == 0 && (last || (owner + 1 < owners && block + 1 == (owner + 1) * shard_blocks))) {
      slot[0] = static_cast<int32_t>(min(start + total, capacity));
    }
    if (threadIdx.x == 0 && last) {
      stats[0] += static_cast<int32_t>(before.taken(all_ties));
      for (++owner; owner < owners; ++owner) payload[owner * slot_words(capacity)] = 0;  // those of no block
    }
  }
}

// Of the step that moves: with more, none has less to do, and all add up more.
constexpr int64_t kMostThreadBlocks = 2048;

}  // namespace

void topk_select(const Correction& values, const float* threshold, const int32_t* ties, const Slots& slots,
                 int32_t* stats, int32_t* workspace, cudaStream_t stream) {
  const int64_t blocks = block_count(values.numel);
  if (blocks == 0) {
    const auto between = static_cast<size_t>(slot_words(slots.capacity)) * sizeof(int32_t);
    cudaMemset2DAsync(slots.words, between, 0, sizeof(int32_t), static_cast<size_t>(slots.owners), stream);
    return;
  }
  const TopkWorkspace space(workspace, values.numel);
  dispatch(values.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    mark_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        static_cast<const T*>(values.grad), values.error, values.numel, threshold, ties, space.masks,
        space.counts, stats);
  });
  const int64_t shard_blocks = slots.owners == 1 ? blocks : slots.shard_numel / kBlock;
  const int64_t share = ceil_div(blocks, kMostThreadBlocks);
  move_kernel<<<static_cast<unsigned>(ceil_div(blocks, share)), static_cast<unsigned>(kBlockWords), 0,
                stream>>>(values.error, blocks, share, threshold, ties, shard_blocks, slots.owners,
                          slots.capacity, space.masks, space.counts, slots.words, stats);
}

}  // namespace dear::compress::cuda
