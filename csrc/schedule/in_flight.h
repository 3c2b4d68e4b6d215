#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace dear {

// Whether an exchange is on its way, and which one: the next may be submitted before a waiter of this one has
// woken, since another thread, or a signal's handler, waited too.
class InFlight {
 public:
  InFlight() = default;
  // For vectors of what has one, which are filled before anything moves.
  InFlight(const InFlight& other) : begun_(other.begun_), turn_(other.turn_.load()) {}

  void begin() { turn_ = ++begun_; }
  int64_t turn() const { return turn_; }  // 0: nothing is on its way
  // The first that has waited for this one does what comes behind it. The others find it done.
  template <typename Action>
  void end(int64_t turn, std::mutex& mutex, Action action) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (turn_ != turn) return;
    action();
    turn_ = 0;
  }

 private:
  int64_t begun_ = 0;
  std::atomic<int64_t> turn_{0};
};

}  // namespace dear
