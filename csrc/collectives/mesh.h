#pragma once

#include "collectives/host_lane.h"
#include "collectives/mesh_transfer.h"

namespace dear {

// All-to-alls of host tensors over TCP connections to every peer.
class MeshLane : public HostLane {
 public:
  // `key` must be the same on all members and new for every lane on this store. `ranks`: the members, none
  // for all of `peers`.
  MeshLane(std::shared_ptr<Peers> peers, const c10::intrusive_ptr<c10d::Store>& store, const std::string& key,
           std::chrono::milliseconds timeout, std::vector<int> ranks = {});
  ~MeshLane() override;

  std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                          std::string label) override;

 protected:
  void transfer(Exchange& exchange, const TransferContext& context) override;
  void tell(FrameType type, const Failure& failure) override;
  void remark(int culprit) override;
  std::optional<Failure> find_news() override { return std::nullopt; }  // it may lie behind data
  std::vector<int> find_gone() const override;
  bool open_to(int peer) const override;
  bool all_hung_up() const override;
  std::vector<int> connections() const override;

 private:
  std::unique_ptr<MeshLinks> links_;  // null where the rank is alone
  std::unique_ptr<MeshTransfer> transfer_;
};

}  // namespace dear
