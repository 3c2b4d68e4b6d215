#pragma once

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "collectives/members.h"
#include "collectives/peers.h"

namespace dear {

// A file descriptor that closes itself: set-up may throw at any line.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// Connections by rank; -1 where there is none.
struct Connections {
  std::vector<Socket> called;
  std::vector<Socket> accepted;
};

// Calls the ranks `callees` and is called by the ranks `callers`, all of which must do likewise; returns when
// every member of the lane has all its connections. Callers are served side by side: who connects and says
// nothing keeps nobody waiting. See Note [Who may join] at Hello.
//
// Throws one sentence that names who did not come, and after which time; or who has ended meanwhile, as far
// as connections that were made before, here or for another lane, tell. Every rank that still waits throws
// the same one. May throw what check_interrupt() throws.
Connections connect_ranks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
                          const std::string& lane, const std::vector<int>& callees,
                          const std::vector<int>& callers, std::chrono::milliseconds timeout);

}  // namespace dear
