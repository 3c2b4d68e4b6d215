"""A step that is left out since a gradient was not finite, in two levels: it leaves no trace, on whatever rank."""

import compressing
import pytest
import torch
from compressing import backward, everyones, gradients
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress

SIZE = 2
KINDS = compressing.KINDS | {
    "int3 by elements": lambda **o: compress.Dense(torch.int3, scale="element", exempt=(), **o),
}
#: Of one matrix alone, the other place of a node owns nothing, and only reads.
SHAPES = {"alone": {"matrix": (64, 48)}, "some": {"matrix": (150, 200), "vector": (30_000,), "other": (90, 300)}}


def left_out(rank, world, kind, shapes, policy):
    compressor = KINDS[kind](nonfinite=policy)
    model = DDP(compressing.Prescribed(shapes).to(place()), bucket_cap_mb=100, find_unused_parameters=True)
    compress.register(model, compressor, hierarchy=SIZE)
    owed = {}
    for step in range(6):
        grads = gradients(rank, step, shapes)
        if step == 3 and rank == 1:
            grads["matrix"][0, 0] = torch.nan
        have = backward(model, grads)
        now = compressing.kept(compressor)
        if step == 3:
            assert not have or not have["matrix"].isfinite().all()
            assert now.keys() == owed.keys() and all(torch.equal(now[name], owed[name]) for name in now)
        else:
            for other in everyones(have):
                assert all(torch.equal(other[name], have[name]) for name in shapes), f"replicas differ at {step}"
        owed = now


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_left_out_leaves_no_trace(pool4, kind, shapes, policy):
    pool4.run(left_out, kind, SHAPES[shapes], policy)
