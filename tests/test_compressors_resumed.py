"""States saved before, at and next to a change of the rank, together with dense first steps."""

import pytest
import torch
from compressing import SHAPES, attach, backward, gradients

import compress

OPTIONS = {
    "learned and changed": {"rank": [(0, 8), (4, 2)], "start_step": 4},
    "changed while dense": {"rank": [(0, 2), (2, 8), (4, 3)], "start_step": 6},
    "changed twice": {"rank": [(0, 8), (4, 2), (5, 8)]},
}


def resumed(rank: int, world: int, kind: str, which: str) -> None:
    """A run that goes on from any step has the same results, bit for bit."""
    compressor = getattr(compress, kind)(**OPTIONS[which])
    model = attach(compressor)
    states, results = [], []
    for step in range(8):
        states.append(compressor.state_dict(gather=True))
        results.append(backward(model, gradients(rank, step)))
    for begin in (3, 4, 5):
        again = getattr(compress, kind)(**OPTIONS[which])
        again.load_state_dict(states[begin])
        model = attach(again)
        for step in range(begin, 8):
            have = backward(model, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (begin, step)


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("kind", ["ACPSGD", "PowerSGD"])
def test_the_factors_that_count_are_saved(pool2, kind, which):
    pool2.run(resumed, kind, which)
