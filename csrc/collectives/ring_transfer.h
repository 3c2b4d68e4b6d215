#pragma once

#include "collectives/host_lane.h"
#include "collectives/links.h"
#include "collectives/ring_plan.h"

namespace dear {

// Moves one exchange round the ring; returns when this rank's part is done. Throws one sentence that names
// the rank to blame, the phase and the fusion group; before that it tells the next rank, so that all ranks
// name the same one. After a throw the connections are of no further use. `scratch` grows to what it needs.
void run_ring_transfer(const Exchange& exchange, const RingPlan& plan, const RingLinks& links,
                       std::vector<char>& scratch, const TransferContext& context);

}  // namespace dear
