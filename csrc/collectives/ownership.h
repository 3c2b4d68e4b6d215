#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace dear {

// Elements [begin, end) of a flat buffer, which stand from `at` on in their owner's chunk.
struct Range {
  int64_t begin;
  int64_t end;
  int64_t at = 0;

  int64_t size() const { return end - begin; }
};

// Which rank owns which elements of a flat buffer. A rank's chunk is its ranges, one after another. What
// nobody owns does not move. Immutable, and shared by the exchanges of one buffer.
class Ownership {
 public:
  // Equal chunks, as Shards cuts them.
  static std::shared_ptr<const Ownership> even(int64_t numel, int world);

  // The ranges of each rank. Throws unless they lie in the buffer and each element has one owner at most.
  Ownership(int64_t numel, std::vector<std::vector<Range>> by_rank);

  // Whether this is what even() gave, which needs no mention.
  bool is_even() const { return even_; }
  int64_t numel() const { return numel_; }
  int world() const { return static_cast<int>(by_rank_.size()); }
  const std::vector<Range>& ranges(int rank) const { return by_rank_.at(static_cast<size_t>(rank)); }
  // Elements of a rank's chunk, and of all.
  int64_t size(int rank) const;
  int64_t owned() const;
  // Whether somebody owns the element.
  bool owns(int64_t element) const;
  // The same without the ranges that `leave` tells of; the others keep their places in the chunks.
  template <typename Leave>
  std::shared_ptr<const Ownership> without(Leave leave) const {
    auto rest = std::make_shared<Ownership>(*this);
    rest->even_ = false;
    for (auto& ranges : rest->by_rank_) {
      std::vector<Range> kept;
      for (const Range& range : ranges) {
        if (!leave(range)) kept.push_back(range);
      }
      ranges = std::move(kept);
    }
    return rest;
  }

 private:
  int64_t numel_;
  std::vector<std::vector<Range>> by_rank_;
  bool even_ = false;
};

}  // namespace dear
