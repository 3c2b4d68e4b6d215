#pragma once

#include <atomic>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "collectives/lane.h"
#include "collectives/staging.h"

namespace dear {

// A lane that calls the backend's own reduce-scatter and all-gather, on a process group of its own. Nothing
// here blocks the host for a stream-ordered backend: submit() is ordered behind the caller's current stream,
// and wait() orders the caller's current stream behind the result.
//
// Threads: one submits at a time; any may wait, each on its own stream.
//
// Note [Two communicators]
// A lane's process group is a communicator of its own, and NCCL warns that kernels of two communicators,
// which occupy the GPU until their peers come, may deadlock: if rank 0 runs A and waits for rank 1, which
// runs B and waits for rank 0. It takes ranks whose GPUs start A and B in different orders *and* have no room
// for both.
// - Every rank launches in one order, not only within a lane but over all lanes. One thread submits (the
//   training thread, or the one that runs backward, never both at once), and what it submits next is decided
//   by DDP's bucket order and by the forward order that rank 0 gave to all: by nothing that happens to be
//   ready. Deferred exchanges are built where they are submitted, for native lanes at once.
// - From NCCL 2.26 on, NCCL_LAUNCH_ORDER_IMPLICIT=1 makes the order of launches that of execution, across
//   communicators of a device: then the first point is enough by itself. (Left to whoever runs the job: it
//   costs an event a launch, and before CUDA 12.3 NCCL serialises with it.)
// - Without it, streams may start in another order, and streams that share a hardware queue wait for each
//   other. But a queue only ever makes what was launched later wait for what was launched earlier; so does
//   the order in a stream, and what a collective waits for on other ranks stands at its own place in the one
//   order. Nothing waits for what comes after it, so there is no circle.
// - What waits must have room beside what it waits for: a collective here takes few of the processors (NCCL's
//   channels: at most 64 thread blocks a communicator), and no kernel of ours waits for another rank.
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
  // How the chunks of these parts, some uneven, are staged: equally on all ranks.
  Chunks chunks_of(Phase phase, const std::vector<Part>& parts) const;

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::string abort_reason_;
};

}  // namespace dear
