"""A script that goes on in a function of atexit from before `import dear`: run by test_exit.py."""

import atexit
import sys
from datetime import timedelta


def go_on() -> None:
    """Called behind what this library registers."""
    try:
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(full, full)], "late").wait()
    except RuntimeError as error:
        print(error)


atexit.register(go_on)

import torch  # noqa: E402

from dear import _C  # noqa: E402
from dear.collectives import make_lane  # noqa: E402

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
lane = make_lane(torch.distributed.group.WORLD, "test", "ring", timedelta(seconds=60))
full = torch.ones(4)
