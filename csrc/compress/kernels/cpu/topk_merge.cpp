// The owners' merge of sparse payloads, and their decoding.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/streamed.h"
#include "compress/kernels/cpu/topk.h"
#include "compress/kernels/cpu/topk_loops.h"

namespace dear::compress::cpu {

namespace {

// One slot of a payload, wherever it lies.
struct Slot {
  const int32_t* words;
  int64_t capacity;

  // Clamped, so that no payload off the wire can make us read or write out of bounds.
  int64_t count() const { return std::clamp<int64_t>(words[0], 0, capacity); }
  const int32_t* indices() const { return words + kSlotHeader; }
  float value(int64_t entry) const {
    return bits_float(static_cast<uint32_t>(words[kSlotHeader + capacity + entry]));
  }
  int64_t first_at_or_after(int64_t index) const {
    return std::lower_bound(indices(), indices() + count(), index) - indices();
  }
};

}  // namespace

int64_t topk_accumulate(const int32_t* payloads, int64_t lists, int64_t capacity, float alpha, float* dense,
                        int64_t n) {
  std::atomic<int64_t> dropped{0};
  // Threads own ranges of the result, and lists are sorted: no two threads meet, and every sum runs in list
  // order.
  at::parallel_for(0, n, kGrainBlocks * kBlock, [&](int64_t first, int64_t last) {
    for (int64_t list = 0; list < lists; ++list) {
      const Slot slot{payloads + list * slot_words(capacity), capacity};
      const int64_t count = slot.count();
      const int32_t* indices = slot.indices();
      for (int64_t entry = slot.first_at_or_after(first); entry < count && indices[entry] < last; ++entry) {
        if (indices[entry] < first) continue;
        float& total = dense[indices[entry]];
        const float sum = total + alpha * slot.value(entry);
        if (is_finite(sum)) {
          total = sum;
        } else {
          dropped.fetch_add(1, std::memory_order_relaxed);  // rare
        }
      }
    }
  });
  return dropped.load();
}

void topk_decode(const int32_t* payloads, int64_t owners, int64_t capacity, int64_t shard_numel, float alpha,
                 GradType type, void* out, int64_t n) {
  const DecodedResult result(out, type, n);
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first_block, int64_t last_block) {
    const StreamFence fence;
    alignas(64) float scratch[kBlock];
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kBlock;
      const int64_t last = std::min(first + kBlock, n);
      float* values = result.values(first, scratch);
      std::fill(values, values + (last - first), 0.0f);
      for (int64_t owner = first / shard_numel; owner < owners && owner * shard_numel < last; ++owner) {
        const int64_t base = owner * shard_numel;
        const int64_t low = std::max(first - base, int64_t{0});
        const int64_t high = std::min(last - base, shard_numel);
        const Slot slot{payloads + owner * slot_words(capacity), capacity};
        const int64_t count = slot.count();
        const int32_t* indices = slot.indices();
        for (int64_t entry = slot.first_at_or_after(low); entry < count && indices[entry] < high; ++entry) {
          if (indices[entry] < low) continue;
          values[base + indices[entry] - first] = alpha * slot.value(entry);
        }
      }
      result.store(first, last - first, values);
    }
  });
}

}  // namespace dear::compress::cpu
