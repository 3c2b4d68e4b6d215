#pragma once

#include <functional>
#include <memory>

namespace dear {

// Note [Threads at exit]
// Who drops the last reference to a tensor that Python has seen asks for the interpreter's lock, a thread of
// ours as well. While the interpreter ends, Python (before 3.14) ends a thread that asks, on the spot, in the
// middle of a destructor, which C++ answers by "terminate called without an active exception"; or the thread
// waits for the lock, and who holds it for the thread. A script that ended right behind its last exchange was
// aborted so. So no thread of ours goes on until then: Python's atexit calls stop_threads(), behind what was
// registered later than this library was loaded, such as an engine's wait for its last all-gather.

// What is said to who goes on behind that.
inline constexpr const char* kInterpreterEnds =
    "Python is ending, and what it runs at exit has stopped the communication lanes: end training before, "
    "or in a function that is registered with atexit after import dear.";

// Stops whoever has an AtExit: first all are told to end, since one may wait for another, then all are
// joined. Whoever has one later counts as stopped. To be called without the GIL. Does nothing in a forked
// child for what its parent made.
void stop_threads();

// An owner of a thread has one, from the thread's start until it stops the thread itself.
class AtExit {
 public:
  // `end` lets what the thread is at fail; `join` waits for the thread. Both may run when the owner has
  // stopped nothing yet, on any thread, and never behind cancel().
  AtExit(std::function<void()> end, std::function<void()> join);
  ~AtExit() {
    cancel([] {});
  }
  AtExit(const AtExit&) = delete;
  AtExit& operator=(const AtExit&) = delete;

  // Takes it back, having run `last`, for which stop_threads() waits; or, where that was here first, having
  // waited for what runs of it. Returns whether `last` was run.
  bool cancel(const std::function<void()>& last);

  struct Entry;

 private:
  std::shared_ptr<Entry> entry_;
};

}  // namespace dear
