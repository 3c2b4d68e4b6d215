#pragma once

#include <vector>

#include "collectives/exchange.h"

namespace dear {

// Packs ranges that are scattered over the buffers of an exchange into staging buffers, one of each type, in
// which a rank's chunk is contiguous. Made once, with the exchange.
//
// Note [Staging]
// A ring moves long ranges where they stand. Short ones would cost a frame each, so they travel together:
// 5,000 parameters of three elements cost the frames of one buffer of 15,000.
//
// A backend's own collectives want one equal chunk of each rank. So everything is staged, and chunks are
// padded to the longest: a link carries (P-1) L elements, L being the longest chunk of the whole fusion group
// and not of each of its buckets. The other way would be one grouped call of a reduce (or broadcast) to each
// owner, whose links carry N - M of N elements, M being the shortest chunk. Where chunks are balanced, both
// are (P-1)/P N. Padding is two copies inside the device's memory, and one operation, whose algorithm the
// backend chooses; grouped calls are one operation for each range and a fixed algorithm. So pad.
class Staging {
 public:
  // Stages the ranges of less than `below` bytes of those parts whose chunks are uneven. With `pad`, chunks
  // get the length of the longest.
  Staging(std::vector<Part> parts, Phase phase, int rank, int world, int64_t below, bool pad);

  // What is to be moved in place of the parts: what is left of them, and the staging buffers.
  const std::vector<Part>& parts() const { return moved_; }
  // Before the exchange: from the parts to the staging buffers. After it: back.
  void pack() { copy(in_); }
  void unpack() { copy(out_); }

 private:
  struct Copies {
    std::vector<at::Tensor> from;
    std::vector<at::Tensor> to;
  };
  struct Staged {  // a range that is packed
    size_t part;
    Range range;
  };

  void stage(const std::vector<Part>& parts, const std::vector<std::vector<Staged>>& by_rank, Phase phase,
             int rank, bool pad);
  static void copy(Copies& copies);

  std::vector<Part> moved_;
  Copies in_;
  Copies out_;
};

}  // namespace dear
