#include "compress/kernels/cpu/segments.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

// Copies n values, `out` may be `values`; returns how many are not finite.
DEAR_CLONES uint32_t copy_counting(const float* values, int64_t n, float* out) {
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    count += is_finite(values[i]) ? 0u : 1u;
    out[i] = values[i];
  }
  return count;
}

namespace {

constexpr int64_t kGrainBlocks = 8;

// Calls visit(start, position, length) for all segments, cut in blocks that the threads share evenly, however
// long each segment is.
template <typename Visit>
void for_blocks(const Segment* segments, int64_t count, const Visit& visit) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += block_count(segments[i].numel);
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t before = 0;  // blocks of the segments before this one
    for (const Segment* segment = segments; before < last; ++segment) {
      const int64_t own = block_count(segment->numel);
      for (int64_t block = std::max(first - before, int64_t{0}); block < std::min(last - before, own);
           ++block) {
        const int64_t offset = block * kBlock;
        visit(segment->start + offset, segment->position + offset, std::min(kBlock, segment->numel - offset));
      }
      before += own;
    }
  });
}

}  // namespace

int64_t gather_segments(const void* source, GradType type, const Segment* segments, int64_t count,
                        float* message) {
  std::atomic<int64_t> lost{0};
  for_blocks(segments, count, [&](int64_t start, int64_t position, int64_t length) {
    float* target = message + position;
    const float* values = load_block(element(source, type, start), type, length, target);
    const uint32_t found = copy_counting(values, length, target);
    if (found != 0) lost.fetch_add(found, std::memory_order_relaxed);
  });
  return lost.load();
}

void scatter_segments(const float* message, const Segment* segments, int64_t count, GradType type,
                      void* out) {
  for_blocks(segments, count, [&](int64_t start, int64_t position, int64_t length) {
    store_block(message + position, type, length, element(out, type, start));
  });
}

}  // namespace dear::compress::cpu
