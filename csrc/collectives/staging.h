#pragma once

#include <vector>

#include "collectives/exchange.h"

namespace dear {

// How the chunks of a staging buffer lie: one right behind the other; each from a multiple of 16 bytes on, as
// GPUs read fastest, with nothing in between that moves; or each as long as the longest.
enum class Chunks { kPacked, kAligned, kPadded };

// What padding would add to what the parts with uneven chunks move among `world` ranks, as a share of it.
double padding_share(const std::vector<Part>& parts, int world);

// Packs ranges that are scattered over the buffers of an exchange into staging buffers, one of each type, in
// which a rank's chunk is contiguous. Made once, with the exchange.
//
// Note [Staging]
// A ring moves long ranges where they stand. Short ones would cost a frame each, so they travel together:
// 5,000 parameters of three elements cost the frames of one buffer of 15,000.
//
// For a backend's own collectives everything is staged, and travels in one of two ways:
// - Padded: a reduce-scatter or an all-gather wants one equal chunk of each rank, so chunks are padded to the
//   longest. A link carries (P-1) L elements, L being the longest chunk of the whole fusion group and not of
//   each of its buckets. That is one operation, whose algorithm the backend chooses.
// - Grouped: a reduce to each owner, or a broadcast from each, of chunks as long as they are. The ranks
//   together send (P-1) N elements, which are those of an all-reduce's half, and the busiest link of a ring
//   carries N - M, M being the shortest chunk. NCCL makes one operation of them, others one each.
// With equal chunks both carry (P-1)/P N. Grouped calls are taken where they are fewer bytes:
// - Where padding would add more than 2% to the sum of all chunks. (Padding all of a GPT with Muon would add
//   11% with 4 ranks and 52% with 8.)
// - Where gloo reduces. Its reduce-scatter is an all-reduce, twice a ring's bytes; its reduce is a
//   reduce-scatter and a gather, 1 + 1/P times a ring's.
// All ranks know all chunks and have the same backend, so they decide alike, once, when the exchange is made.
//
// A grouped reduce may leave partial sums in other ranks' chunks (gloo's does). Nobody reads them: of a
// reduce-scatter's staging buffer, unpack() takes the rank's own chunk alone, and pack() writes all of it.
class Staging {
 public:
  // Stages the ranges of less than `below` bytes of those parts whose chunks are uneven.
  Staging(std::vector<Part> parts, Phase phase, int rank, int world, int64_t below, Chunks layout);

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
             int rank, Chunks layout);
  static void copy(Copies& copies);

  std::vector<Part> moved_;
  Copies in_;
  Copies out_;
};

}  // namespace dear
