#pragma once

#include <vector>

#include "collectives/exchange.h"

namespace dear {

// A contiguous run of elements that travels in one frame.
struct Piece {
  const char* own;  // this rank's values of the run: the reduce-scatter's input, or the all-gather's buffer
  char* out;        // where the result goes; null where a partial sum goes on to the next rank
  int64_t count;    // elements
  int64_t bytes;
  at::ScalarType type;
  int64_t source = -1;  // of a piece to send: the received piece whose result it is; -1 for own values
  size_t slot = 0;      // of a received partial sum: where it waits until it is sent on
  bool summed = false;  // of a received piece: it is a partial sum, not its sender's own values
};

// Which pieces one rank sends and receives, in order. With P ranks a half takes P-1 steps; in step s rank r
//   reduce-scatter: sends chunk r-1-s (its own values, then the partial sums that came in step s-1),
//                   receives chunk r-2-s; the last to come is chunk r, its own.
//   all-gather:     sends chunk r-s, receives chunk r-1-s.
// So what is sent in step s is what was received in step s-1. Every rank cuts a chunk into the same pieces,
// so they need no description on the wire.
//
// Note [Blocks]
// A chunk goes round in blocks of a few pieces, two blocks at a time: what a rank receives it sends on
// shortly after, out of the cache, and while it waits for one block it works on the other.
//
// Note [Empty pieces]
// Of a chunk without elements a piece without elements goes round, where there are more than two ranks. So
// nobody ends an exchange before the rank before it has got something of it, by which who is held up knows
// more than who is ahead. See Note [Who speaks first].
struct RingPieces {
  std::vector<Piece> outbound;
  std::vector<Piece> inbound;
  size_t slots = 0;           // for partial sums, and one more at the end for the last step
  int64_t largest_piece = 0;  // bytes
  uint32_t signature = 0;     // what neighbours compare: phase, sizes and types
};

RingPieces make_ring_pieces(const Exchange& exchange, int rank, int world);

}  // namespace dear
