#pragma once

#include <chrono>
#include <functional>

#include "collectives/links.h"
#include "collectives/ring_plan.h"

namespace dear {

// What a transfer needs to know of the lane it runs in.
struct RingContext {
  const RingLinks* links;
  int rank;
  int world;
  std::chrono::milliseconds timeout;
  uint32_t sequence;                          // of this exchange in its lane
  int wake_fd;                                // readable when `abort_reason` has something to say
  std::function<std::string()> abort_reason;  // empty while the lane is wanted
  std::vector<char>* scratch;                 // grows to what the largest exchange needs, and stays
};

// Moves one exchange round the ring; returns when this rank's part is done. Throws one sentence that names
// the rank to blame, the phase and the fusion group; before that it tells the next rank, so that all ranks
// name the same one. After a throw the connections are of no further use.
void run_ring_transfer(const Exchange& exchange, const RingPlan& plan, const RingContext& context);

}  // namespace dear
