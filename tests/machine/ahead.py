"""One rank goes ahead of another, as far as it gets by itself, however busy the machine is.

The rank that is held looks at the other process until nothing in it runs: it has done what it was to do too early, or
it waits for the held rank, as it should. No time is measured that a busy machine could stretch.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta

from torch.distributed import distributed_c10d as c10d

PATIENCE = timedelta(seconds=10)  # for the other rank to get there
LONGEST = 4.0  # seconds that the other rank is watched: less than what it waits for a peer
LOOKS = 12  # at a process that sleeps
PAUSE = 0.003  # seconds between looks
RUNNING = "RD"  # on a processor, or waiting for one or for a disk


def go(tag: str) -> None:
    """This process goes ahead: who is held at ``tag`` watches it from now on."""
    c10d._get_default_store().set(f"ahead/{tag}", str(os.getpid()))


def hold(tag: str) -> None:
    """Returns when the process that goes ahead has come as far as it can."""
    store = c10d._get_default_store()
    store.wait([f"ahead/{tag}"], PATIENCE)
    other = int(store.get(f"ahead/{tag}"))
    limit = time.monotonic() + LONGEST
    quiet = 0
    while quiet < LOOKS and time.monotonic() < limit:
        quiet = 0 if _runs(other) else quiet + 1
        time.sleep(PAUSE)


def _runs(pid: int) -> bool:
    """Whether any thread of the process, or of one that it has started, is running."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/task/{task}/stat") as stat:
                    if stat.read().rpartition(")")[2].split()[0] in RUNNING:
                        return True
                with open(f"/proc/{pid}/task/{task}/children") as children:
                    if any(_runs(int(child)) for child in children.read().split()):
                        return True
    return False
