#pragma once

#include "collectives/host_lane.h"
#include "collectives/links.h"
#include "collectives/ring_plan.h"

namespace dear {

// Moves one exchange round the ring; returns when this rank's part is done. Throws a Failure that names the
// rank to blame, the phase and the fusion group; before that it publishes it and tells both neighbours. After
// a throw the connections are of no further use. `scratch` grows to what it needs.
//
// Data goes from each rank to the next. Against it only news travels, for which there is thus always room.
void run_ring_transfer(const Exchange& exchange, const RingPlan& plan, const RingLinks& links,
                       std::vector<char>& scratch, const TransferContext& context);

}  // namespace dear
