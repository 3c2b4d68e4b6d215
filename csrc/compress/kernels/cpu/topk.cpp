#include "compress/kernels/cpu/topk.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <mutex>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/scratch.h"
#include "compress/kernels/cpu/streamed.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

constexpr int64_t kGrainBlocks = 8;

// The sample that narrows an exact selection: a cache line of gradient out of every 32 of them.
constexpr int64_t kSampleRun = 16;
constexpr int64_t kSampleStride = 32;
constexpr int64_t kSampleWander = 13;

// The 31 bits of a magnitude, in the digits of the radix selection, most significant first.
constexpr int kDigitShift[] = {20, 10, 0};
constexpr int kDigitBits[] = {11, 10, 10};
using Histogram = std::array<uint32_t, kHistogramBins>;

uint32_t magnitude_bits(float value) { return float_bits(value) & ~kSignBit; }

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

// Inlined into the clones, so that each has it in its own instructions.
template <typename Magnitude>
[[gnu::always_inline]] inline int64_t mask_run(const Magnitude& magnitude, int64_t words, uint32_t threshold,
                                               int32_t* masks) {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t mask = 0;
    for (int bit = 0; bit < kWordBits; ++bit) {
      mask |= static_cast<uint32_t>(magnitude(word * kWordBits + bit) >= threshold) << bit;
    }
    masks[word] = static_cast<int32_t>(mask);
    count += __builtin_popcount(mask);
  }
  return count;
}

}  // namespace

// Magnitudes of grad + error as integers, whose order is the order of the floats.
DEAR_CLONES void magnitudes_of_sum(const float* grad, const float* error, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = grad[i] + error[i];
    out[i] = float_bits(is_finite(sum) ? sum : error[i]) & ~kSignBit;
  }
}

DEAR_CLONES void magnitudes(const float* values, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_bits(values[i]) & ~kSignBit;
}

// One mask bit per element: |value| >= threshold. Returns how many are set.
DEAR_CLONES int64_t mask_words(const float* values, int64_t words, uint32_t threshold, int32_t* masks) {
  return mask_run([&](int64_t i) { return float_bits(values[i]) & ~kSignBit; }, words, threshold, masks);
}

DEAR_CLONES int64_t mask_magnitudes(const uint32_t* values, int64_t words, uint32_t threshold,
                                    int32_t* masks) {
  return mask_run([&](int64_t i) { return values[i]; }, words, threshold, masks);
}

DEAR_CLONES int64_t count_at_least(const uint32_t* values, int64_t n, uint32_t limit) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += values[i] >= limit;
  return count;
}

DEAR_CLONES int64_t count_equal(const float* values, int64_t n, uint32_t threshold) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += (float_bits(values[i]) & ~kSignBit) == threshold;
  return count;
}

namespace {

// Counts the next digit of every magnitude whose higher digits equal `prefix`.
void count_digit(const uint32_t* values, int64_t n, int digit, uint32_t prefix, Histogram* histograms) {
  const int shift = kDigitShift[digit];
  const uint32_t mask = (1u << kDigitBits[digit]) - 1;
  if (digit == 0) {
    // Neighbouring gradients fall in the same bins: two histograms halve the wait on the last increment.
    for (int64_t i = 0; i + 2 <= n; i += 2) {
      ++histograms[0][values[i] >> shift];
      ++histograms[1][values[i + 1] >> shift];
    }
    if (n % 2 != 0) ++histograms[0][values[n - 1] >> shift];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] >> (shift + kDigitBits[digit]) == prefix) ++histograms[0][(values[i] >> shift) & mask];
  }
}

// The bits of |grad + error| from `offset` on; at most a block of them.
void read_magnitudes(const void* grad, GradType type, const float* error, int64_t offset, int64_t length,
                     uint32_t* out) {
  if (grad == nullptr) return magnitudes(error + offset, length, out);
  float scratch[kBlock];
  const float* values = load_block(element(grad, type, offset), type, length, scratch);
  magnitudes_of_sum(values, error + offset, length, out);
}

// Calls visit(magnitudes, length) for the blocks [first, last). The magnitudes may be overwritten, up to a
// block.
template <typename Visit>
void for_magnitudes(const void* grad, GradType type, const float* error, int64_t n, int64_t first,
                    int64_t last, const Visit& visit) {
  uint32_t bits[kBlock];
  for (int64_t block = first; block < last; ++block) {
    const int64_t offset = block * kBlock;
    const int64_t length = std::min(kBlock, n - offset);
    read_magnitudes(grad, type, error, offset, length, bits);
    visit(bits, length);
  }
}

Histogram histogram_of_digit(const void* grad, GradType type, const float* error, int64_t n, int digit,
                             uint32_t prefix) {
  Histogram total{};
  std::mutex mutex;
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    Histogram local[2] = {};
    for_magnitudes(grad, type, error, n, first, last, [&](const uint32_t* values, int64_t length) {
      count_digit(values, length, digit, prefix, local);
    });
    const std::lock_guard<std::mutex> guard(mutex);
    for (int64_t bin = 0; bin < kHistogramBins; ++bin) total[bin] += local[0][bin] + local[1][bin];
  });
  return total;
}

// A magnitude that k elements reach almost surely, and not many more: one run out of every stretch of
// kSampleStride of them is looked at, and six standard deviations are allowed for. Zero: the sample says
// nothing.
uint32_t limit_from_sample(const void* grad, GradType type, const float* error, int64_t n, int64_t k) {
  const int64_t stretch = kSampleRun * kSampleStride;
  const int64_t runs = n / stretch;
  const double expected = static_cast<double>(k) / kSampleStride;
  const int64_t rank = static_cast<int64_t>(expected + 6 * std::sqrt(expected)) + 1;
  if (rank > runs * kSampleRun / 4) return 0;
  uint32_t* sample = thread_scratch<uint32_t>(runs * kSampleRun);
  for (int64_t run = 0; run < runs; ++run) {
    // The place within the stretch wanders, so that a matrix's columns do not line up with the sample.
    const int64_t offset = run * stretch + run * kSampleWander % kSampleStride * kSampleRun;
    read_magnitudes(grad, type, error, offset, kSampleRun, sample + run * kSampleRun);
  }
  std::nth_element(sample, sample + rank - 1, sample + runs * kSampleRun, std::greater<>());
  return sample[rank - 1];
}

// Few magnitudes that the k largest are among, unordered; none where the sample did not find such, as where
// most magnitudes are equal.
struct Candidates {
  uint32_t* begin;
  int64_t count;
};

Candidates collect_candidates(const void* grad, GradType type, const float* error, int64_t n, int64_t k) {
  const uint32_t limit = limit_from_sample(grad, type, error, n, k);
  if (limit == 0) return {nullptr, 0};
  const int64_t room = std::min(n, 2 * k + kBlock);
  uint32_t* found = thread_scratch<uint32_t>(room);
  std::atomic<int64_t> total{0};
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    int32_t masks[kBlockWords];
    for_magnitudes(grad, type, error, n, first, last, [&](uint32_t* values, int64_t length) {
      const int64_t words = ceil_div(length, kWordBits);
      std::fill(values + length, values + words * kWordBits, 0);  // the limit is above zero
      const int64_t count = mask_magnitudes(values, words, limit, masks);
      int64_t position = total.fetch_add(count, std::memory_order_relaxed);
      if (position + count > room) return;
      for (int64_t word = 0; word < words; ++word) {
        for (uint32_t mask = static_cast<uint32_t>(masks[word]); mask != 0; mask &= mask - 1) {
          found[position++] = values[word * kWordBits + __builtin_ctz(mask)];
        }
      }
    });
  });
  const bool usable = total >= k && total <= room;
  return {found, usable ? total.load() : 0};
}

// Whatever the magnitudes are: one pass over all of them for each digit.
void radix_select(const void* grad, GradType type, const float* error, int64_t n, int64_t k, float* threshold,
                  int32_t* ties) {
  uint32_t prefix = 0;
  int64_t wanted = k;  // rank of the k-th largest among the elements that share `prefix`
  for (int digit = 0; digit < 3; ++digit) {
    const Histogram histogram = histogram_of_digit(grad, type, error, n, digit, prefix);
    int64_t bin = (int64_t{1} << kDigitBits[digit]) - 1;
    while (bin > 0 && static_cast<int64_t>(histogram[bin]) < wanted) wanted -= histogram[bin--];
    prefix = prefix << kDigitBits[digit] | static_cast<uint32_t>(bin);
  }
  *threshold = bits_float(prefix);
  *ties = static_cast<int32_t>(wanted);
}

}  // namespace

void topk_threshold(const void* grad, GradType type, const float* error, int64_t n, int64_t k,
                    float* threshold, int32_t* ties) {
  const Candidates few = collect_candidates(grad, type, error, n, k);
  if (few.count == 0) return radix_select(grad, type, error, n, k, threshold, ties);
  uint32_t* kth = few.begin + k - 1;
  std::nth_element(few.begin, kth, few.begin + few.count, std::greater<>());
  const int64_t above = std::count_if(few.begin, kth, [kth](uint32_t value) { return value > *kth; });
  *threshold = bits_float(*kth);
  *ties = static_cast<int32_t>(k - above);
}

void topk_refresh(const void* grad, GradType type, const float* error, int64_t n, int64_t k, int64_t slack,
                  float* threshold, int32_t* ties) {
  const uint32_t limit = magnitude_bits(*threshold);
  std::atomic<int64_t> selected{0};
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t count = 0;
    for_magnitudes(grad, type, error, n, first, last, [&](const uint32_t* values, int64_t length) {
      count += count_at_least(values, length, limit);
    });
    selected.fetch_add(count, std::memory_order_relaxed);
  });
  if (std::abs(selected.load() - k) > slack) topk_threshold(grad, type, error, n, k, threshold, ties);
}

SelectCounts topk_select(const void* grad, GradType type, float* error, int64_t n, float threshold,
                         int32_t ties, int64_t shard_numel, int64_t owners, int64_t capacity,
                         int32_t* payload, int32_t* masks, int32_t* counts) {
  const int64_t blocks = block_count(n);
  const uint32_t limit = magnitude_bits(threshold);
  const bool all_ties = ties < 0;

  // 1. Correct the error in place; note what passes the threshold, one bit each, and how many per block.
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t lost = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, n - offset);
      float* values = error + offset;
      if (grad != nullptr) lost += correct_run(element(grad, type, offset), type, values, length);
      int32_t* block_masks = masks + block * kBlockWords;
      const int64_t whole = length / kWordBits;
      int64_t count = mask_words(values, whole, limit, block_masks);
      if (length % kWordBits != 0) {
        uint32_t mask = 0;
        for (int64_t i = whole * kWordBits; i < length; ++i) {
          mask |= static_cast<uint32_t>(magnitude_bits(values[i]) >= limit) << (i % kWordBits);
        }
        block_masks[whole] = static_cast<int32_t>(mask);
        count += __builtin_popcount(mask);
      }
      counts[2 * block] = static_cast<int32_t>(count);
      counts[2 * block + 1] =
          all_ties || count == 0 ? 0 : static_cast<int32_t>(count_equal(values, length, limit));
    }
    dropped.fetch_add(lost, std::memory_order_relaxed);
  });

  // 2. Where each block's entries start in its owner's slot, and how many ties it may still take.
  int64_t found = 0;
  int64_t ties_left = ties;
  for (int64_t owner = 0; owner < owners; ++owner) {
    const int64_t first = std::min(blocks, owner * shard_numel / kBlock);
    const int64_t last = owner + 1 == owners ? blocks : std::min(blocks, (owner + 1) * shard_numel / kBlock);
    int64_t position = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t count = counts[2 * block];
      const int64_t equal = counts[2 * block + 1];
      const int64_t taken_ties = all_ties ? 0 : std::min(equal, ties_left);
      const int64_t taken = all_ties ? count : count - equal + taken_ties;
      ties_left -= taken_ties;
      // Reuse the two words: where to write, and how many ties to take (negative: no need to look).
      counts[2 * block] = taken == 0 ? -1 : static_cast<int32_t>(std::min(position, capacity));
      counts[2 * block + 1] = taken_ties == equal ? -1 : static_cast<int32_t>(taken_ties);
      position += taken;
    }
    payload[owner * slot_words(capacity)] = static_cast<int32_t>(std::min(position, capacity));
    found += position;
  }

  // 3. Move the entries. Few cache lines are touched, because few elements were selected.
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t position = counts[2 * block];
      if (position < 0) continue;
      int64_t tie_quota = counts[2 * block + 1];
      const int64_t offset = block * kBlock;
      const int64_t owner = owners == 1 ? 0 : offset / shard_numel;
      int32_t* indices = payload + owner * slot_words(capacity) + kSlotHeader;
      int32_t* values = indices + capacity;
      const int64_t base = offset - owner * shard_numel;
      const int64_t words = ceil_div(std::min(kBlock, n - offset), kWordBits);
      for (int64_t word = 0; word < words && position < capacity; ++word) {
        uint32_t mask = static_cast<uint32_t>(masks[block * kBlockWords + word]);
        for (; mask != 0 && position < capacity; mask &= mask - 1) {
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
  return {found, dropped.load()};
}

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
