#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dear {

// One span of a timeline: "reduce-scatter", "all-gather", "update" or "wait" as lane, nanoseconds of the
// monotonic clock.
struct TraceEvent {
  std::string lane;
  std::string name;
  int64_t start_ns;
  int64_t end_ns;
};

// What the training thread lost to communication since the last reset.
struct WaitTimes {
  int64_t reduce_scatter_ns = 0;
  int64_t all_gather_ns = 0;
};

}  // namespace dear
