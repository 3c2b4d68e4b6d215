#include "collectives/links.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "collectives/rendezvous.h"

namespace dear {
namespace {

constexpr int kMeshUnsent = 128 << 10;  // bytes a mesh's socket holds before it counts as full

void set_option(int fd, int option, int value) {
  ::setsockopt(fd, IPPROTO_TCP, option, &value, sizeof(value));
}

}  // namespace

RingLinks::RingLinks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
                     const std::string& key, std::chrono::milliseconds timeout) {
  const int next = members.next();
  const int prev = members.previous();
  Connections made = connect_ranks(peers, members, store, key, {next}, {prev}, timeout);
  to_next_ = made.called[static_cast<size_t>(next)].release();
  from_prev_ = made.accepted[static_cast<size_t>(prev)].release();
  set_option(to_next_, TCP_NODELAY, 1);
}

RingLinks::~RingLinks() {
  if (to_next_ >= 0) ::close(to_next_);
  if (from_prev_ >= 0) ::close(from_prev_);
}

MeshLinks::MeshLinks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
                     const std::string& key, std::chrono::milliseconds timeout)
    : peers_(static_cast<size_t>(peers.world()), -1) {
  const int rank = members.rank();
  std::vector<int> callees;
  std::vector<int> callers;
  for (const int peer : members.ranks()) {
    if (peer != rank) (peer > rank ? callees : callers).push_back(peer);
  }
  Connections made = connect_ranks(peers, members, store, key, callees, callers, timeout);
  for (const int peer : members.ranks()) {
    if (peer == rank) continue;
    const auto at = static_cast<size_t>(peer);
    peers_[at] = (peer > rank ? made.called[at] : made.accepted[at]).release();
    set_option(peers_[at], TCP_NODELAY, 1);
    // See Note [One after another] at MeshTransfer.
    set_option(peers_[at], TCP_NOTSENT_LOWAT, kMeshUnsent);
  }
}

MeshLinks::~MeshLinks() {
  for (const int peer : peers_) {
    if (peer >= 0) ::close(peer);
  }
}

}  // namespace dear
