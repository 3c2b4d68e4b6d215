#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <optional>
#include <vector>

#include "collectives/lane.h"

namespace dear {

// Which ranks share a node: every node has as many, in the order of their places inside it.
using Nodes = std::vector<std::vector<int>>;

// A lane that moves everything in two levels, by two other lanes: one among the ranks of this node, one among
// the ranks of equal place in every node. Its exchanges mean what those of one lane over all ranks mean.
//
// Note [Two levels]
// With L ranks in each of N nodes, a rank's chunk of n elements is n / (L N):
//   reduce-scatter: inside the node, after which the rank of place l has the node's sum of all chunks that
//                   owners of place l get; then between the nodes, among ranks of place l, each of whom
//                   keeps its own chunk.
//   all-gather:     the same in reverse order.
// So a node's port carries (N - 1) / N of n, each element once, however many ranks the node has.
//
// Both levels are deferred exchanges of their lanes, queued at once; the second waits for the first on the
// thread of its own lane. No order can deadlock: both lanes take exchanges in the order in which they were
// submitted here, and within each of them the second level waits for the first alone.
//
// Under a backend of a GPU's nothing waits on a thread: the second level is queued where it is submitted,
// behind a wait for the first. On the caller's stream that wait would hold up what the exchange is to go on
// beside, the backward or the forward pass. So both are submitted on a stream of the lane's own, behind the
// caller's.
//
// A mean is taken level by level, which rounds otherwise than in one: equal to rounding, not bit for bit.
//
// Threads: as those of Lane.
class TwoLevelLane : public Lane {
 public:
  // `inside`: the ranks of this node, by place. `between`: the ranks of this one's place, by node.
  TwoLevelLane(std::shared_ptr<Lane> inside, std::shared_ptr<Lane> between, Nodes nodes);

  std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                          std::string label) override;
  void submit(const std::shared_ptr<Exchange>& exchange) override;
  void abort(const std::string& reason) override;
  std::optional<Failure> investigate(const std::string& phase, const std::string& label,
                                     std::chrono::milliseconds patience) override {
    return inside_->investigate(phase, label, patience);
  }
  int rank() const override { return nodes_.at(between_->rank()).at(inside_->rank()); }
  int world() const override { return inside_->world() * between_->world(); }

  // What this rank has sent since the lane was made, by level.
  int64_t bytes_inside() const { return *sent_inside_; }
  int64_t bytes_between() const { return *sent_between_; }

 private:
  const std::shared_ptr<Lane> inside_;
  const std::shared_ptr<Lane> between_;
  const Nodes nodes_;
  std::optional<c10::Stream> stream_;  // on a GPU, with what orders it behind the caller
  std::optional<c10::Event> called_;
  // Counted on the lanes' threads, which may outlive this.
  const std::shared_ptr<std::atomic<int64_t>> sent_inside_ = std::make_shared<std::atomic<int64_t>>(0);
  const std::shared_ptr<std::atomic<int64_t>> sent_between_ = std::make_shared<std::atomic<int64_t>>(0);
};

}  // namespace dear
