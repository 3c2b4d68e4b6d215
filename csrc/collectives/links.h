#pragma once

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "collectives/members.h"
#include "collectives/peers.h"

namespace dear {

// The two TCP connections that make this rank part of a ring: one to the next rank, one from the previous.
// Addresses are exchanged through the process group's store. Closed by the destructor.
//
// Note [Why sockets, and not the backend's send/recv]
// Gloo's send/recv wakes two threads for every segment and delivers it to memory before it can be summed. A
// lane that owns its sockets needs one thread, one wake-up per piece, sums out of the cache, sees a dead peer
// at once, and can say on the wire who is to blame. On a machine that is busy computing, that CPU time is
// training time.
class RingLinks {
 public:
  // Throws one sentence when a neighbour cannot be reached within `timeout`.
  RingLinks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
            const std::string& key, std::chrono::milliseconds timeout);
  ~RingLinks();
  RingLinks(const RingLinks&) = delete;
  RingLinks& operator=(const RingLinks&) = delete;

  int to_next() const { return to_next_; }
  int from_prev() const { return from_prev_; }

 private:
  int to_next_ = -1;
  int from_prev_ = -1;
};

// A TCP connection to every other rank, used both ways. Made and closed as those of a ring.
class MeshLinks {
 public:
  // Throws one sentence when a rank cannot be reached within `timeout`.
  MeshLinks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
            const std::string& key, std::chrono::milliseconds timeout);
  ~MeshLinks();
  MeshLinks(const MeshLinks&) = delete;
  MeshLinks& operator=(const MeshLinks&) = delete;

  int to(int peer) const { return peers_[static_cast<size_t>(peer)]; }

 private:
  std::vector<int> peers_;  // by rank; -1 for this one, and for who is no member
};

}  // namespace dear
