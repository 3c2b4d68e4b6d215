#pragma once

#include "collectives/links.h"
#include "collectives/ring_pieces.h"
#include "collectives/transfer.h"

namespace dear {

// What transfers work in, one after another; grows to what they need.
struct RingScratch {
  std::vector<char> slots;       // partial sums
  std::vector<uint32_t> checks;  // by received piece: the checksum of what is sent on of it
};

// Moves one exchange round the ring; returns when this rank's part is done, and then whether the next rank
// has said meanwhile that it leaves, which it does not say again. Throws a Failure that names the rank to
// blame, the phase and the fusion group; before that it publishes it and tells both neighbours. After a throw
// the connections are of no further use, and what is in the outputs is not defined.
//
// Note [Checksums in the cache]
// No byte is fetched from memory for its checksum alone. What is sent for the first time is summed behind the
// kernel's copy, see Note [The checksum comes last]. What is received is checked and added a block at a time,
// while the block is in the first-level cache, and the checksum of the result is taken in the same pass. What
// an all-gather sends on is what came, and so is its checksum.
//
// Data goes from each rank to the next. Against it only news travels, for which there is thus always room.
bool run_ring_transfer(const Exchange& exchange, const RingPieces& pieces, const RingLinks& links,
                       RingScratch& scratch, const TransferContext& context);

}  // namespace dear
