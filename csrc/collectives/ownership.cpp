#include "collectives/ownership.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "collectives/shard.h"

namespace dear {

std::shared_ptr<const Ownership> Ownership::even(int64_t numel, int world) {
  const Shards shards{numel, world};
  std::vector<std::vector<Range>> by_rank(static_cast<size_t>(world));
  for (int rank = 0; rank < world; ++rank) {
    if (shards.size(rank) > 0) by_rank[static_cast<size_t>(rank)] = {{shards.begin(rank), shards.end(rank)}};
  }
  auto owners = std::make_shared<Ownership>(numel, std::move(by_rank));
  owners->even_ = true;
  return owners;
}

Ownership::Ownership(int64_t numel, std::vector<std::vector<Range>> by_rank)
    : numel_(numel), by_rank_(std::move(by_rank)) {
  std::vector<Range> all;
  for (auto& ranges : by_rank_) {
    int64_t at = 0;
    for (Range& range : ranges) {
      range.at = at;
      at += range.size();
    }
    all.insert(all.end(), ranges.begin(), ranges.end());
  }
  std::sort(all.begin(), all.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  int64_t end = 0;
  for (const Range& range : all) {
    TORCH_CHECK(range.begin >= end && range.end > range.begin && range.end <= numel, "The range [",
                range.begin, ", ", range.end, ") of a buffer of ", numel,
                " elements is empty, outside of it, or owned twice: give each element one owner.");
    end = range.end;
  }
}

int64_t Ownership::size(int rank) const {
  int64_t total = 0;
  for (const Range& range : ranges(rank)) total += range.size();
  return total;
}

bool Ownership::owns(int64_t element) const {
  const auto holds = [&](const Range& range) { return range.begin <= element && element < range.end; };
  return std::any_of(by_rank_.begin(), by_rank_.end(), [&](const std::vector<Range>& ranges) {
    return std::any_of(ranges.begin(), ranges.end(), holds);
  });
}

int64_t Ownership::owned() const {
  int64_t total = 0;
  for (int rank = 0; rank < world(); ++rank) total += size(rank);
  return total;
}

}  // namespace dear
