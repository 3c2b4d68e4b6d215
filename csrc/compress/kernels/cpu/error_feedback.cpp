#include "compress/kernels/cpu/error_feedback.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/isa.h"

namespace dear::compress::cpu {

namespace {
constexpr int kLanes = 16;
constexpr int64_t kGrainBlocks = 8;
}  // namespace

DEAR_CLONES int64_t correct_block(const float* grad, const float* error, float* corrected, int64_t n,
                                  double* magnitude) {
  // Separate lanes because float addition may not be reordered: without them the sum would run one by one.
  float sums[kLanes] = {};
  uint32_t dropped[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float kept = error[i + lane];
      const float sum = grad[i + lane] + kept;
      const bool finite = is_finite(sum);
      const float value = finite ? sum : kept;
      dropped[lane] += finite ? 0u : 1u;
      sums[lane] += std::fabs(value);
      corrected[i + lane] = value;
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) {
    const float sum = grad[i] + error[i];
    const float value = is_finite(sum) ? sum : error[i];
    dropped[lane] += is_finite(sum) ? 0u : 1u;
    sums[lane] += std::fabs(value);
    corrected[i] = value;
  }
  double total = 0;
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    total += sums[lane];
    count += dropped[lane];
  }
  *magnitude = total;
  return count;
}

int64_t error_correct(const void* grad, GradType type, float* error, int64_t n) {
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    float scratch[kBlock];
    double magnitude;
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, n - offset);
      const float* values = load_block(element(grad, type, offset), type, length, scratch);
      count += correct_block(values, error + offset, error + offset, length, &magnitude);
    }
    dropped.fetch_add(count, std::memory_order_relaxed);
  });
  return dropped.load();
}

}  // namespace dear::compress::cpu
