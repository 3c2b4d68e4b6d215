#pragma once

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

namespace dear {

// Why a lane carries nothing any more, in one sentence, and the ranks to blame. They travel in the exception:
// GCC 12 loses what a function stores and then throws (a fault of -fipa-modref).
struct Failure : std::runtime_error {
  Failure(const std::string& what, std::vector<int> ranks, bool leaves = false)
      : std::runtime_error(what), blamed(std::move(ranks)), leaving(leaves) {}
  std::vector<int> blamed;
  bool leaving;  // this rank leaves the lane, which is no failure of its other lanes
};

// "Rank 3 <what> during the all-gather of fusion group 2, as rank 0 saw it."
Failure make_failure(const std::vector<int>& ranks, const std::string& what, const char* phase,
                     const std::string& label, int seen_by);

// What came over the network as text: what is not UTF-8, and control characters, replaced by '?'.
std::string sanitised(const std::string& text);

// What several callers have to say of a neighbour, each a predicate of "Rank 3 ...".
namespace complaint {
std::string closed();
// Of two ranks; and of this one.
std::string apart();
std::string alone();
std::string lost(int error);
std::string corrupt();
std::string damaged();
std::string elsewhere();
std::string silent(std::chrono::milliseconds timeout);
// `reason` is what rank `rank` gave on leaving; it may be empty.
std::string left(int rank, const std::string& reason);
}  // namespace complaint

}  // namespace dear
