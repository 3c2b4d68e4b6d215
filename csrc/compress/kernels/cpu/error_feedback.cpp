#include "compress/kernels/cpu/error_feedback.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>

#include "compress/kernels/cpu/cast.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {
constexpr int64_t kGrainBlocks = 8;

// A float32 sum of this many magnitudes, in 4 lanes or more, is good to 4e-6 at worst; float64 adds the
// parts.
constexpr int64_t kSumPart = 256;
}  // namespace

DEAR_CLONES int64_t correct_block(const float* grad, const float* error, float* corrected, int64_t n,
                                  double* magnitude) {
  double sum_of_parts = 0;
  uint32_t count = 0;
  for (int64_t part = 0; part < n; part += kSumPart) {
    const int64_t end = std::min(n, part + kSumPart);
    float total = 0;
    DEAR_SIMD_SUM(total, count)
    for (int64_t i = part; i < end; ++i) {
      const float kept = error[i];
      const float sum = grad[i] + kept;
      const bool finite = is_finite(sum);
      const float value = finite ? sum : kept;
      count += finite ? 0u : 1u;
      total += std::fabs(value);
      corrected[i] = value;
    }
    sum_of_parts += total;
  }
  *magnitude = sum_of_parts;
  if (!(sum_of_parts <= FLT_MAX)) {
    // Values near the largest float: rare enough to be added again, in float64.
    *magnitude = 0;
    for (int64_t i = 0; i < n; ++i) *magnitude += std::fabs(static_cast<double>(corrected[i]));
  }
  return count;
}

DEAR_CLONES uint32_t correct_values(const float* grad, float* error, int64_t n, float limit) {
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    const float sum = grad[i] + error[i];
    const bool kept = within(sum, limit);
    count += kept ? 0u : 1u;
    error[i] = kept ? sum : error[i];
  }
  return count;
}

int64_t correct_run(const void* grad, GradType type, float* error, int64_t n, float limit) {
  float scratch[kBlock];
  int64_t count = 0;
  for (int64_t offset = 0; offset < n; offset += kBlock) {
    const int64_t length = std::min(kBlock, n - offset);
    const float* values = load_block(element(grad, type, offset), type, length, scratch);
    count += correct_values(values, error + offset, length, limit);
  }
  return count;
}

int64_t error_correct(const void* grad, GradType type, float* error, int64_t n) {
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, n, kGrainBlocks * kBlock, [&](int64_t first, int64_t last) {
    const int64_t count = correct_run(element(grad, type, first), type, error + first, last - first);
    dropped.fetch_add(count, std::memory_order_relaxed);
  });
  return dropped.load();
}

}  // namespace dear::compress::cpu
