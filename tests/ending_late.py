"""A script whose lane lets go of the last exchange just when the interpreter of rank 1 ends: run by test_exit.py."""

import atexit
import os
import sys
import time
from pathlib import Path

RANK, ENDING = int(os.environ["RANK"]), Path(sys.argv[1])


def keep_the_lock() -> None:
    """Registered before anything of ours, so called behind it. The exchange ends meanwhile, and its lane's thread finds
    the interpreter's lock taken until the interpreter ends."""
    ENDING.touch()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        pass


if RANK == 1:
    atexit.register(keep_the_lock)
    sys.setswitchinterval(1000)

from datetime import timedelta  # noqa: E402

import torch  # noqa: E402

import dear  # noqa: E402
from dear import _C  # noqa: E402
from dear.collectives import make_lane  # noqa: E402

dear.init_process_group(backend="gloo")
lane = make_lane(torch.distributed.group.WORLD, "test", "ring", timedelta(seconds=60))
sys.kept = lane  # type: ignore[attr-defined]  # nobody stops it by dropping it
while RANK == 0 and not ENDING.exists():
    time.sleep(0.01)
full, shard = torch.ones(1000), torch.zeros(500)
exchange = lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(full, shard)], "the last one")
if RANK == 0:
    try:
        exchange.wait()
    except RuntimeError as error:
        assert "Rank 1 left" in str(error), error
    print("rank 0 has ended its exchange")
del full, shard, exchange  # now the lane has the only references
