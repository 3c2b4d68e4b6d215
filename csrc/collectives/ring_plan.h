#pragma once

#include <vector>

#include "collectives/exchange.h"

namespace dear {

// A contiguous run of elements that travels in one frame.
struct Piece {
  const char* own;  // this rank's values of the run: the reduce-scatter's input, or the all-gather's buffer
  char* out;        // where the result goes: the last step of a reduce-scatter, every step of an all-gather
  int64_t count;    // elements
  int64_t bytes;
  at::ScalarType type;
};

// Which pieces one rank sends and receives, in order. With P ranks a half takes P-1 steps; in step s rank r
//   reduce-scatter: sends chunk r-1-s (its own values, then the partial sums that came in step s-1),
//                   receives chunk r-2-s; the last to come is chunk r, its own.
//   all-gather:     sends chunk r-s, receives chunk r-1-s.
// So what is sent in step s is what was received in step s-1: outbound piece `first_chunk + i` is inbound
// piece i. Every rank cuts a chunk into the same pieces, so they need no description on the wire.
struct RingPlan {
  std::vector<Piece> outbound;
  std::vector<Piece> inbound;
  size_t first_chunk = 0;     // outbound pieces of step 0, which depend on nothing
  size_t last_chunk = 0;      // inbound pieces of the last step, which are not sent on
  size_t largest_chunk = 0;   // pieces
  int64_t largest_piece = 0;  // bytes
  uint32_t signature = 0;     // what neighbours compare: phase, sizes and types
};

RingPlan make_ring_plan(const Exchange& exchange, int rank, int world);

}  // namespace dear
