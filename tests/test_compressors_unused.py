"""What stands in ``.grad`` of a parameter that no rank uses in a step, and what is owed to it."""

import pytest
import torch
from compressing import KINDS, Sometimes, gradients, kept, place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

SHAPES = {"often": (200, 100), "rarely": (100, 200)}
each_kind = pytest.mark.parametrize("kind", KINDS)


def attached(compressor, schedule, **options):
    model = DDP(Sometimes(SHAPES).to(place()), find_unused_parameters=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if schedule:
        dear.attach(model, optimizer, compressor=compressor)
    else:
        compress.register(model, compressor)
    return model, optimizer


def stands(rank, world, kind, view, stale):
    """Nothing is applied to the parameter, and nothing is owed that was not: neither twice nor never."""
    compressor = KINDS[kind]()
    model, optimizer = attached(compressor, False, gradient_as_bucket_view=view)
    param = model.module.get_parameter("rarely")
    for step in range(6):
        used = step not in (3, 4)
        if not (stale and step == 4):
            optimizer.zero_grad(set_to_none=False)
        owed = kept(compressor).get("rarely")
        before = None if param.grad is None else param.grad.detach().clone()
        if stale and step == 4:
            assert before is not None
            before.copy_(torch.randn(100, 200, generator=torch.Generator().manual_seed(1)))
            param.grad.copy_(before)
        grads = {name: grad.to(place()) for name, grad in gradients(rank, step, SHAPES).items()}
        model(grads if used else {"often": grads["often"]}).backward()
        if not used:
            assert owed is not None and before is not None
            have, now = param.grad.detach(), kept(compressor)["rarely"]
            if stale and step == 4 and view:  # see the limits: it is owed
                owed = owed + world * before.cpu().double().flatten()
                before = torch.zeros_like(before)
            assert torch.equal(have, before), step
            torch.testing.assert_close(now, owed, rtol=0, atol=2e-5)
        optimizer.step()


@each_kind
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_an_unused_parameters_gradient_stays_and_nothing_is_owed_twice(pool2, kind, view, stale):
    pool2.run(stands, kind, view, stale)


def shown(rank, world, kind):
    """Under the schedule a gradient of zeros that stands takes part, and gets what is owed."""
    compressor = KINDS[kind]()
    model, optimizer = attached(compressor, True)
    for step in range(5):
        used = step != 3
        owed = kept(compressor).get("rarely")
        optimizer.zero_grad(set_to_none=False)
        grads = {name: grad.to(place()) for name, grad in gradients(rank, step, SHAPES).items()}
        model(grads if used else {"often": grads["often"]}).backward()
        optimizer.step()
        if not used:
            have = model.module.get_parameter("rarely").grad.cpu().double().flatten()
            torch.testing.assert_close(kept(compressor)["rarely"], owed - world * have, rtol=0, atol=2e-5)


@each_kind
def test_under_the_schedule_what_is_owed_is_paid_once(pool2, kind):
    pool2.run(shown, kind)
