"""K-FAC and DP-KFAC give what their golden models give: on plain DDP, and under the schedule."""

import preconditioning
import pytest
import torch
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

OPTIONS = {"damping": 0.01, "factor_decay": 0.8, "update_every": 2, "inverse_every": 3, "kl_clip": 1e-3}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
STEPS = 8


def trained(rank, world, kind, attach, options, steps=STEPS, step=None):
    """Parameters, and who owned which layer."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    method = getattr(precondition, kind)(**options)
    engine = None
    if attach is None:
        precondition.register(model, optimizer, method)
    else:
        engine = dear.attach(model, optimizer, preconditioner=method, **attach)
    for number in range(steps):
        x, y = (each.to(place()) for each in preconditioning.batch(rank, number))
        (step or plain_backward)(model, x, y)
        if attach is None:
            method.step()
        optimizer.step()
        optimizer.zero_grad()
    owner = {layer.name: of for layer, of in method._binding._owner.items()}
    found = {name: value.clone() for name, value in model.module.state_dict().items()}
    if engine is not None:
        engine.detach()
    else:
        method.release()
    return found, owner


def plain_backward(model, x, y):
    torch.nn.functional.mse_loss(model(x), y).backward()


def golden(world, kind, owner, options, steps=STEPS):
    net = preconditioning.build()
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    model = preconditioning.Golden(world, owner if kind == "DPKFAC" else None, **options)
    for number in range(steps):
        model.train(net, optimizer, number)
    return net.state_dict()


def same(have, want):
    for name, value in want.items():
        torch.testing.assert_close(
            have[name].cpu(), value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def equal_to_golden(rank, world, kind, solver, attach):
    options = {**OPTIONS, "solver": solver}
    have, owner = trained(rank, world, kind, attach, options)
    assert set(owner) == set(preconditioning.layers_of(preconditioning.build()))
    same(have, golden(world, kind, owner, options))


OWNED = {"update": "owned", "bucket_cap_mb": 0.002}


@pytest.mark.parametrize("kind", ["KFAC", "DPKFAC"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_golden(request, world, kind):
    pool = request.getfixturevalue(f"pool{world}")
    for attach in (None, OWNED, {}):
        pool.run(equal_to_golden, kind, "cholesky", attach)
    pool.run(equal_to_golden, kind, "eigen", OWNED)
