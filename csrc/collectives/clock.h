#pragma once

#include <chrono>
#include <cstdint>

namespace dear {

// Nanoseconds of the monotonic clock, the one Python calls time.perf_counter_ns().
inline int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

}  // namespace dear
