// Work on rows of a payload, shared out among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "compress/kernels/cpu/streamed.h"
#include "compress/kernels/scaled_rows.h"

namespace dear::compress::cpu {

// A block of elements of one owner's row.
struct Place {
  int64_t row;
  int64_t offset;  // in the shard
  int64_t length;

  int64_t element(const Rows& rows) const { return row * rows.shard + offset; }
};

// Calls visit(place) for the blocks of all rows, of which n elements exist; adds up what it returns.
template <typename Visit>
int64_t sum_over_rows(const Rows& rows, int64_t n, const Visit& visit) {
  constexpr int64_t kGrainBlocks = 8;
  const int64_t blocks = block_count(rows.shard);
  std::atomic<int64_t> total{0};
  at::parallel_for(0, rows.count * blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    const StreamFence fence;
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      Place place{block / blocks, block % blocks * kBlock, 0};
      const int64_t in_shard = rows.shard - place.offset;
      place.length = std::min(std::min(kBlock, in_shard), n - place.element(rows));
      if (place.length > 0) count += visit(place);
    }
    total.fetch_add(count, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace dear::compress::cpu
