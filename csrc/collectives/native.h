#pragma once

#include <atomic>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "collectives/exchange.h"

namespace dear {

// A lane that calls the backend's own reduce-scatter and all-gather, on a process group of its own. Nothing
// here blocks the host for a stream-ordered backend: submit() is ordered behind the caller's current stream,
// and wait() orders the caller's current stream behind the result.
//
// Threads: one submits at a time; any may wait.
class NativeLane : public Lane {
 public:
  explicit NativeLane(c10::intrusive_ptr<c10d::ProcessGroup> group);

  std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                          std::string label) override;
  void submit(const std::shared_ptr<Exchange>& exchange) override;
  void abort(const std::string& reason) override;
  int rank() const override { return group_->getRank(); }
  int world() const override { return group_->getSize(); }

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::string abort_reason_;
};

}  // namespace dear
