#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
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

// What those who wait note, several threads among them: a script may call engine.synchronize() in any.
class Timeline {
 public:
  void start() { tracing_ = true; }
  bool tracing() const { return tracing_; }
  std::vector<TraceEvent> stop() {
    tracing_ = false;
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(events_, {});
  }
  // Nothing where there is no trace.
  void note(const std::string& lane, const std::string& name, int64_t start_ns, int64_t end_ns) {
    if (!tracing_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back({lane, name, start_ns, end_ns});
  }

  void waited(int64_t WaitTimes::* total, int64_t ns) {
    const std::lock_guard<std::mutex> lock(mutex_);
    waits_.*total += ns;
  }
  WaitTimes take_waits() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(waits_, {});
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> tracing_{false};
  std::vector<TraceEvent> events_;
  WaitTimes waits_;
};

}  // namespace dear
