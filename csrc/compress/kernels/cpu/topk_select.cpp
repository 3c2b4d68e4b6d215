// The selection of what passes a threshold.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/topk.h"
#include "compress/kernels/cpu/topk_loops.h"

namespace dear::compress::cpu {

namespace {

// What one step leaves to the next, two words for each block. Behind the first: how many elements reach the
// threshold, and how many of those are equal to it, counted where not all of them are taken. Behind the
// second: where in its owner's slot the block's entries begin (negative: it has none), and how many of the
// equal ones are taken (negative: all).
struct BlockCounts {
  int32_t* words;

  int32_t& first(int64_t block) const { return words[2 * block]; }
  int32_t& second(int64_t block) const { return words[2 * block + 1]; }
};

// Step 1: correct the error in place; note what reaches the threshold, one bit each, and how many per block.
// Returns how many elements were not finite.
int64_t mark(const Correction& values, uint32_t limit, bool all_ties, int32_t* masks, BlockCounts counts) {
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, block_count(values.numel), kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t lost = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, values.numel - offset);
      float* corrected = values.error + offset;
      if (values.grad != nullptr) {
        lost += correct_run(element(values.grad, values.type, offset), values.type, corrected, length);
      }
      int32_t* block_masks = masks + block * kBlockWords;
      const int64_t whole = length / kWordBits;
      int64_t count = mask_words(corrected, whole, limit, block_masks);
      if (length % kWordBits != 0) {
        uint32_t mask = 0;
        for (int64_t i = whole * kWordBits; i < length; ++i) {
          mask |= static_cast<uint32_t>(magnitude_bits(corrected[i]) >= limit) << (i % kWordBits);
        }
        block_masks[whole] = static_cast<int32_t>(mask);
        count += __builtin_popcount(mask);
      }
      counts.first(block) = static_cast<int32_t>(count);
      counts.second(block) =
          all_ties || count == 0 ? 0 : static_cast<int32_t>(count_equal(corrected, length, limit));
    }
    dropped.fetch_add(lost, std::memory_order_relaxed);
  });
  return dropped.load();
}

// Step 2: what each slot holds, where in it each block's entries begin, and how many ties the block may still
// take (`ties` negative: all). Returns how many elements are selected, before capacities.
int64_t place(int64_t blocks, int32_t ties, const Slots& slots, BlockCounts counts) {
  const bool all_ties = ties < 0;
  int64_t found = 0;
  int64_t ties_left = ties;
  for (int64_t owner = 0; owner < slots.owners; ++owner) {
    const int64_t first = std::min(blocks, owner * slots.shard_numel / kBlock);
    const int64_t last =
        owner + 1 == slots.owners ? blocks : std::min(blocks, (owner + 1) * slots.shard_numel / kBlock);
    int64_t position = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t count = counts.first(block);
      const int64_t equal = counts.second(block);
      const int64_t taken_ties = all_ties ? 0 : std::min(equal, ties_left);
      const int64_t taken = all_ties ? count : count - equal + taken_ties;
      ties_left -= taken_ties;
      counts.first(block) = taken == 0 ? -1 : static_cast<int32_t>(std::min(position, slots.capacity));
      counts.second(block) = taken_ties == equal ? -1 : static_cast<int32_t>(taken_ties);
      position += taken;
    }
    slots.of(owner)[0] = static_cast<int32_t>(std::min(position, slots.capacity));
    found += position;
  }
  return found;
}

// Step 3: move the entries. Few cache lines are touched, because few elements were selected.
void move(float* error, int64_t numel, uint32_t limit, const int32_t* masks, const Slots& slots,
          BlockCounts counts) {
  at::parallel_for(0, block_count(numel), kGrainBlocks, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t position = counts.first(block);
      if (position < 0) continue;
      int64_t tie_quota = counts.second(block);
      const int64_t offset = block * kBlock;
      const int64_t owner = slots.owners == 1 ? 0 : offset / slots.shard_numel;
      int32_t* indices = slots.of(owner) + kSlotHeader;
      int32_t* values = indices + slots.capacity;
      const int64_t base = offset - owner * slots.shard_numel;
      const int64_t words = ceil_div(std::min(kBlock, numel - offset), kWordBits);
      for (int64_t word = 0; word < words && position < slots.capacity; ++word) {
        uint32_t mask = static_cast<uint32_t>(masks[block * kBlockWords + word]);
        for (; mask != 0 && position < slots.capacity; mask &= mask - 1) {
          const int64_t i = word * kWordBits + __builtin_ctz(mask);
          const float value = error[offset + i];
          if (tie_quota >= 0 && magnitude_bits(value) == limit && tie_quota-- == 0) {
            tie_quota = 0;
            continue;
          }
          indices[position] = static_cast<int32_t>(base + i);
          values[position] = static_cast<int32_t>(float_bits(value));
          error[offset + i] = 0;
          ++position;
        }
      }
    }
  });
}

}  // namespace

SelectCounts topk_select(const Correction& values, float threshold, int32_t ties, const Slots& slots,
                         int32_t* masks, int32_t* counts) {
  const uint32_t limit = magnitude_bits(threshold);
  const BlockCounts of_blocks{counts};
  const int64_t dropped = mark(values, limit, ties < 0, masks, of_blocks);
  const int64_t found = place(block_count(values.numel), ties, slots, of_blocks);
  move(values.error, values.numel, limit, masks, slots, of_blocks);
  return {found, dropped};
}

}  // namespace dear::compress::cpu
