#pragma once

#include "collectives/host_lane.h"
#include "collectives/links.h"
#include "collectives/ring_transfer.h"

namespace dear {

// Reduce-scatters and all-gathers round a ring of TCP connections.
class RingLane : public HostLane {
 public:
  // `key` must be the same on all members and new for every lane on this store. `ranks`: the members, none
  // for all of `peers`.
  RingLane(std::shared_ptr<Peers> peers, const c10::intrusive_ptr<c10d::Store>& store, const std::string& key,
           std::chrono::milliseconds timeout, std::vector<int> ranks = {});
  ~RingLane() override;

  std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                          std::string label) override;

 protected:
  void transfer(Exchange& exchange, const TransferContext& context) override;
  void tell(FrameType type, const Failure& failure) override;
  void remark(int culprit) override;
  std::optional<Failure> find_news() override;
  std::vector<int> find_gone() const override;
  bool open_to(int peer) const override;
  bool all_hung_up() const override;
  std::vector<int> connections() const override;

 private:
  std::unique_ptr<RingLinks> links_;
  RingScratch scratch_;
  std::atomic<bool> next_left_{false};  // it has said that it leaves, in good order
};

}  // namespace dear
