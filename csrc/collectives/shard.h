#pragma once

#include <algorithm>
#include <cstdint>

namespace dear {

// How a flat buffer of `numel` elements is cut among `world` ranks: equal chunks of ceil(numel / world)
// elements, the last ones short or empty. The one rule on which collectives, optimizer shards and saved
// states agree.
struct Shards {
  int64_t numel;
  int world;

  int64_t chunk() const { return (numel + world - 1) / world; }
  int64_t begin(int rank) const { return std::min(numel, chunk() * rank); }
  int64_t end(int rank) const { return std::min(numel, chunk() * (rank + 1)); }
  int64_t size(int rank) const { return end(rank) - begin(rank); }
};

}  // namespace dear
