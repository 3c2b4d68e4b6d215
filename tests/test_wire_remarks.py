"""Who waits on one lane says so on the others: Note [Who is to blame] in csrc/collectives/peers.h."""

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from wire import in_ranks, peers

from dear import _C

NUMEL = 1000


def submit(lane):
    full = torch.ones(NUMEL * lane.world)
    if isinstance(lane, _C.MeshLane):
        return lane.submit(_C.Phase.all_to_all, _C.Reduction.sum, [(full, torch.empty_like(full))], "fusion group 2")
    return lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(full, torch.empty(NUMEL))], "fusion group 1")


def lanes(kind, members, shared, store, seconds):
    """A lane of these ranks; each has a patience of its own."""
    made = in_ranks(
        len(members),
        lambda at: kind(
            shared[members[at]], store, "-".join(map(str, members)), timedelta(seconds=seconds[members[at]]), members
        ),
    )
    return dict(zip(members, made, strict=True))


class Chain:
    """Rank 3 takes part in nothing. Rank 2 waits for it on one lane, rank 1 for rank 2 on another one, and rank 0 for
    rank 1 on a third one. Rank 0 loses patience first, long after the others have begun to ask themselves why."""

    SECONDS = (8.0, 12.0, 12.0, 60.0)

    def __init__(self, kind):
        shared, store = [peers(rank, 4) for rank in range(4)], dist.HashStore()
        chain = [lanes(kind, members, shared, store, self.SECONDS) for members in ([2, 3], [1, 2], [0, 1])]
        for made in chain:
            for exchange in [submit(lane) for lane in made.values()]:
                exchange.wait()
        self._lanes = chain
        self.exchanges = [submit(lane[rank]) for lane, rank in zip(chain, (2, 1, 0), strict=True)]


def test_who_is_held_up_elsewhere_is_not_blamed():
    """Ring and mesh side by side, since each takes as long as its timeout."""
    ring, mesh = (Chain(kind) for kind in (_C.RingLane, _C.MeshLane))
    for exchange in (*ring.exchanges, *mesh.exchanges):
        with pytest.raises(RuntimeError) as caught:
            exchange.wait()
        # Round a ring the news of rank 0 come first; in a mesh they stand behind the data of an exchange.
        first = 0 if exchange in ring.exchanges else r"\d"
        assert re.match(rf"Rank 3 sent or took nothing for \d+ ms .*, as rank {first} saw it\.$", str(caught.value))


def passes_again(kind):
    """Rank 2 comes after all; the next exchanges find none of what was said meanwhile in their way."""
    shared, store = [peers(rank, 3) for rank in range(3)], dist.HashStore()
    seconds = (60.0, 10.0, 60.0)
    first, second = (lanes(kind, members, shared, store, seconds) for members in ([1, 2], [0, 1]))
    for made in (first, second):
        for exchange in [submit(lane) for lane in made.values()]:
            exchange.wait()
    return first, second


@pytest.mark.parametrize("kind", [_C.RingLane, _C.MeshLane])
def test_exchanges_go_on_behind_remarks(kind):
    first, second = passes_again(kind)
    waiting = submit(first[1])
    held = submit(second[0])  # rank 0 hears that rank 1 waits for rank 2
    ahead = 3.0  # seconds: more than a quarter, and far less than all, of rank 1's patience
    time.sleep(ahead)
    assert not waiting.done() and not held.done()
    for exchange in (submit(first[2]), submit(second[1]), waiting, held):
        exchange.wait()
    for made in (first, second, second):
        for exchange in [submit(lane) for lane in made.values()]:
            exchange.wait()
