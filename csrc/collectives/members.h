#pragma once

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace dear {

// The ranks that a lane connects: some of a process group's, or all, in the order in which the lane counts
// them. A rank has two numbers: its rank in the group, by which errors name it, and its place in the lane,
// which says what chunk is its own.
class Members {
 public:
  // `ranks`: in order; none for all ranks of the group.
  Members(int rank, int world, std::vector<int> ranks = {}) : ranks_(std::move(ranks)) {
    if (ranks_.empty()) {
      ranks_.resize(static_cast<size_t>(world));
      std::iota(ranks_.begin(), ranks_.end(), 0);
    }
    const auto found = std::find(ranks_.begin(), ranks_.end(), rank);
    if (found == ranks_.end()) throw std::invalid_argument("ranks must contain this rank, and does not.");
    place_ = static_cast<int>(found - ranks_.begin());
  }

  int size() const { return static_cast<int>(ranks_.size()); }
  int place() const { return place_; }
  const std::vector<int>& ranks() const { return ranks_; }
  int rank() const { return ranks_[static_cast<size_t>(place_)]; }
  // The rank `distance` places further on, in a circle.
  int after(int distance) const { return ranks_[static_cast<size_t>((place_ + distance + size()) % size())]; }
  int next() const { return after(1); }
  int previous() const { return after(-1); }

 private:
  std::vector<int> ranks_;
  int place_ = 0;
};

}  // namespace dear
