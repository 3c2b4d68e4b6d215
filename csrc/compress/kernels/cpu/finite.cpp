#include "compress/kernels/cpu/finite.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

DEAR_CLONES uint32_t count_in_block(const float* values, int64_t n) {
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) count += is_finite(values[i]) ? 0u : 1u;
  return count;
}

int64_t count_nonfinite(const void* values, GradType type, int64_t n) {
  constexpr int64_t kGrain = 8 * kBlock;
  std::atomic<int64_t> found{0};
  at::parallel_for(0, n, kGrain, [&](int64_t first, int64_t last) {
    float scratch[kBlock];
    int64_t count = 0;
    for (int64_t begin = first; begin < last; begin += kBlock) {
      const int64_t length = std::min(kBlock, last - begin);
      count += count_in_block(load_block(element(values, type, begin), type, length, scratch), length);
    }
    found.fetch_add(count, std::memory_order_relaxed);
  });
  return found.load();
}

}  // namespace dear::compress::cpu
