"""Options of DDP itself: each trains as it does without this library, or is refused by a sentence.

What an option does is torch's to say, and some are newer than the oldest torch that is served: there they are left out.
"""

from __future__ import annotations

import inspect

import pytest
from silence import EVERY, check, silence
from torch.nn.parallel import DistributedDataParallel as DDP

PROGRAM = """
train(0)

attach()

for step in range(1, 5): train(step)

note(net.state_dict())

with model.no_sync(): forward(5).backward()

forward(6).backward(); opt.step(); opt.zero_grad()
"""
KNOWN_HERE = inspect.signature(DDP).parameters
OPTIONS = {
    "batched copies": {"batched_grad_copy": True},
    "batched copies of views": {"batched_grad_copy": True, "gradient_as_bucket_view": True},
    "a list of sizes": {"bucket_cap_mb_list": [1, 2]},
    "buffers": {"forward_sync_buffers": False},
    "no first broadcast": {"init_sync": False},
    "skips what is unused": {"find_unused_parameters": True, "skip_all_reduce_unused_params": True},
    "small buckets": {"bucket_cap_mb": 0.001},
    "static graph": {"static_graph": True, "bucket_cap_mb": 0.001},
}
CASES = [
    case
    for name, options in OPTIONS.items()
    if KNOWN_HERE.keys() >= options.keys()
    for model in (("Unused",) if "find_unused_parameters" in options else ("Mlp", "Convolution"))
    for case in silence(f"{name}, {model}", PROGRAM, EVERY, model=model, ddp=options)
]


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_an_option_of_ddp_trains_the_same(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
