"""Who waits how long before a peer is blamed: Note [Who speaks first] in csrc/collectives/host_lane.h."""

import re

import pytest
import torch
import torch.distributed as dist
from wire import HEADER, Between, Watched, in_ranks, lane_of, peers

from dear import _C

NUMEL = 1000  # of a chunk: one frame
FRAME, EMPTY = HEADER + 4 * NUMEL + 4, HEADER + 4


class Stalls:
    """Lets pass what comes until it is armed, and then so many bytes more."""

    def __init__(self):
        self.left = None

    def __call__(self, at, data):
        if self.left is not None:
            del data[self.left :]
            self.left -= len(data)


def reduce_scatter(lane):
    full = torch.ones(3 * NUMEL)
    return lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(full, torch.empty(NUMEL))], "fusion group 1")


def uneven_all_gather(lane):
    """Rank 0 owns nothing."""
    full = torch.ones(2 * NUMEL)
    owners = _C.Ownership(2 * NUMEL, [[], [(0, NUMEL)], [(NUMEL, 2 * NUMEL)]])
    return lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(full, full[:0])], "fusion group 1", [owners])


def all_to_all(lane):
    full = torch.ones(3 * NUMEL)
    return lane.submit(_C.Phase.all_to_all, _C.Reduction.sum, [(full, torch.empty_like(full))], "fusion group 1")


class Held:
    """Three lanes. Rank 0's sends rank 1 so many bytes of an exchange, and then nothing more.

    Rank 2 gives up somewhat before rank 1 would, as it may where it has heard of rank 0 somewhat earlier.
    """

    SECONDS = (60.0, 6.4, 6.0)

    def __init__(self, kind, submit, passes):
        self._stalls, self._submit, self._passes = Stalls(), submit, passes

        def seen(rank, host, port):
            return Between((host, port), self._stalls).port if rank == 1 else port

        store = Watched(dist.HashStore(), seen)
        self._lanes = in_ranks(3, lambda rank: lane_of(kind, store, "lane", self.SECONDS[rank], peers(rank, 3)))
        in_ranks(3, lambda rank: submit(self._lanes[rank]).wait())

    def begin(self):
        """Rank 1 stays in an exchange; rank 2, which has all of it, begins the next one."""
        self._stalls.left = self._passes
        first = [self._submit(lane) for lane in self._lanes]
        first[2].wait()
        return first[1], self._submit(self._lanes[2])


def test_who_is_ahead_does_not_blame_who_is_held_up():
    """All kinds side by side, since each takes as long as its timeout."""
    ring = Held(_C.RingLane, reduce_scatter, FRAME)
    uneven = Held(_C.RingLane, uneven_all_gather, EMPTY)
    mesh = Held(_C.MeshLane, all_to_all, 0)
    for pair in [held.begin() for held in (ring, uneven, mesh)]:
        for exchange in pair:
            with pytest.raises(RuntimeError) as caught:
                exchange.wait()
            assert re.match(r"Rank 0 sent or took nothing for 6400 ms .*, as rank 1 saw it\.$", str(caught.value))
