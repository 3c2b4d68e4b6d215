"""Who waits how long before a peer is blamed: Note [Who speaks first] in csrc/collectives/host_lane.h."""

import re

import pytest
import torch
import torch.distributed as dist
from wire import HEADER, Between, Watched, in_ranks, lane_of, peers

from dear import _C

NUMEL = 1000  # of a chunk: one frame
FRAME = HEADER + 4 * NUMEL + 4


class Stalls:
    """Lets pass what comes until it is armed, and then so many bytes more."""

    def __init__(self):
        self.left = None

    def __call__(self, at, data):
        if self.left is not None:
            del data[self.left :]
            self.left -= len(data)


def submit(lane):
    full = torch.ones(NUMEL * lane.world)
    kind = (_C.Phase.all_to_all, full) if isinstance(lane, _C.MeshLane) else (_C.Phase.reduce_scatter, full[:NUMEL])
    return lane.submit(kind[0], _C.Reduction.sum, [(full, torch.empty_like(kind[1]))], "fusion group 1")


class Held:
    """Three lanes, of which rank 0's sends nothing to rank 1 any more once that is wanted.

    Rank 2 gives up somewhat before rank 1 would, as it may where it has heard of rank 0 somewhat earlier.
    """

    SECONDS = (60.0, 6.4, 6.0)

    def __init__(self, kind):
        self._stalls = Stalls()

        def seen(rank, host, port):
            return Between((host, port), self._stalls).port if rank == 1 else port

        store = Watched(dist.HashStore(), seen)
        self.lanes = in_ranks(3, lambda rank: lane_of(kind, store, "lane", self.SECONDS[rank], peers(rank, 3)))
        in_ranks(3, lambda rank: submit(self.lanes[rank]).wait())

    def stall(self, passes):
        """Rank 1 stays in an exchange, of which it gets so many bytes from rank 0; rank 2 begins the next one."""
        self._stalls.left = passes
        first = [submit(lane) for lane in self.lanes]
        first[2].wait()
        return first[1], submit(self.lanes[2])


def test_who_is_ahead_does_not_blame_who_is_held_up():
    """Both kinds side by side, since each takes as long as its timeout."""
    kinds = (_C.RingLane, _C.MeshLane)
    held = [Held(kind) for kind in kinds]
    waits = [each.stall(FRAME if kind is _C.RingLane else 0) for each, kind in zip(held, kinds, strict=True)]
    for pair in waits:
        for exchange in pair:
            with pytest.raises(RuntimeError) as caught:
                exchange.wait()
            assert re.match(r"Rank 0 sent or took nothing for 6400 ms .*, as rank 1 saw it\.$", str(caught.value))
