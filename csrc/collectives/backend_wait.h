#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace dear {

// Waits for what a backend does with host tensors, on a thread of its own: the backend's wait ends with the
// work or with its timeout, and would keep Ctrl-C waiting; and some works (gloo's reduce-scatter) have no
// other way to say that they have ended. The thread ends with the works, also where nobody asks any more.
//
// Threads: any. See Note [Ctrl-C].
class BackendWait {
 public:
  explicit BackendWait(std::vector<c10::intrusive_ptr<c10d::Work>> works);

  // Blocks until the works have ended, well or not. Throws what check_interrupt() throws, and may be called
  // again after that.
  void await_end() const;
  bool ended() const;
  // Throws what the first work that failed threw. To be called once they have ended.
  void rethrow() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace dear
