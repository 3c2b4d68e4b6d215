"""A batch of no samples on one rank, at the end of its data: nothing is learnt from it, and the other ranks' counts."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

KINDS = {name: getattr(precondition, name) for name in ("KFAC", "DPKFAC", "Eva", "FOOF", "Shampoo")}


def net(kind):
    torch.manual_seed(0)
    if kind == "convolution":
        return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)), (2, 6, 6)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)


def trained(rank, name, layers, attached):
    module, shape = net(layers)
    model = DDP(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    preconditioner = KINDS[name]()
    engine = None
    if attached:
        engine = dear.attach(model, optimizer, preconditioner=preconditioner)
    else:
        precondition.register(model, optimizer, preconditioner)
    for step in range(4):
        count = 0 if rank == 1 and step in (1, 3) else 5
        x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        if engine is None:
            preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()
    state = preconditioner.state_dict()
    if engine is not None:
        engine.detach()
    return [param.detach() for param in module.parameters()], state


def empty(rank, world, name, layers):
    want, state = trained(rank, name, layers, False)
    have, _ = trained(rank, name, layers, True)
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, want)
    for other in everyone:
        assert all(map(torch.equal, other, want)), "replicas differ"
    for a, b in zip(want, have, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if name == "KFAC":
        for layer, kept in state["layers"].items():
            torch.testing.assert_close(kept["inputs"][:, -1, -1], torch.ones(kept["inputs"].shape[0]), msg=layer)


@pytest.mark.parametrize("layers", ["linear", "convolution"])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_learnt_from_an_empty_batch(pool2, name, layers):
    pool2.run(empty, name, layers)
