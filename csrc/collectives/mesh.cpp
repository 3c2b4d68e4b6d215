#include "collectives/mesh.h"

#include <algorithm>

namespace dear {

MeshLane::MeshLane(std::shared_ptr<Peers> peers, const c10::intrusive_ptr<c10d::Store>& store,
                   const std::string& key, std::chrono::milliseconds timeout, std::vector<int> ranks)
    : HostLane(std::move(peers), key, timeout, std::move(ranks)) {
  if (world_ > 1) {
    links_ = std::make_unique<MeshLinks>(*peers_, members_, store, key, timeout);
    transfer_ = std::make_unique<MeshTransfer>(*links_, members_);
  }
  start();
}

MeshLane::~MeshLane() { stop(); }

std::shared_ptr<Exchange> MeshLane::make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                  std::string label) {
  TORCH_CHECK(phase == Phase::kAllToAll, "A mesh moves all-to-alls, and a ", phase_name(phase),
              " was asked for: use a ring.");
  for (const Part& part : parts) {
    check_all_to_all(part, world_);
    TORCH_CHECK(part.full.device().is_cpu(), "The mesh moves host tensors, and one on ", part.full.device(),
                " was given: use the native collectives of that device's backend.");
  }
  return std::make_shared<Exchange>(phase, reduction, std::move(parts), std::move(label), world_);
}

void MeshLane::transfer(Exchange& exchange, const TransferContext& context) {
  if (transfer_) {
    transfer_->run(exchange, context);
    return;
  }
  for (const Part& part : exchange.parts()) part.shard.copy_(part.full);
}

void MeshLane::tell(FrameType type, const Failure& failure) {
  if (transfer_) transfer_->tell(type, failure, peers_->check());
}

void MeshLane::remark(int culprit) {
  for (const int peer : members_.ranks()) {
    if (links_ && peer != members_.rank()) push_remark(links_->to(peer), culprit, peers_->check());
  }
}

std::vector<int> MeshLane::find_gone() const {
  std::vector<int> ranks;
  for (const int peer : members_.ranks()) {
    if (!links_ || peer == members_.rank()) continue;
    drop_remarks(links_->to(peer));
    if (hung_up(links_->to(peer))) ranks.push_back(peer);
  }
  return ranks;
}

bool MeshLane::open_to(int peer) const {
  return links_ && links_->to(peer) >= 0 && still_open(links_->to(peer));
}

bool MeshLane::all_hung_up() const {
  const auto& ranks = members_.ranks();
  return !links_ || std::all_of(ranks.begin(), ranks.end(), [this](int peer) {
    return peer == members_.rank() || hung_up(links_->to(peer));
  });
}

std::vector<int> MeshLane::connections() const {
  std::vector<int> all;
  for (const int peer : members_.ranks()) {
    if (links_ && peer != members_.rank()) all.push_back(links_->to(peer));
  }
  return all;
}

}  // namespace dear
