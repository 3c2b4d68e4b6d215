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
#include "compress/kernels/cpu/topk_loops.h"

namespace dear::compress::cpu {

namespace {

// The sample that narrows an exact selection: a cache line of gradient out of every 32 of them.
constexpr int64_t kSampleRun = 16;
constexpr int64_t kSampleStride = 32;
constexpr int64_t kSampleWander = 13;

// The 31 bits of a magnitude, in the digits of the radix selection, most significant first.
constexpr int kDigitShift[] = {20, 10, 0};
constexpr int kDigitBits[] = {11, 10, 10};
using Histogram = std::array<uint32_t, kHistogramBins>;

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

}  // namespace dear::compress::cpu
