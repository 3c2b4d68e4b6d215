"""K-FAC and DP-KFAC give what their golden models give: on plain DDP, and under the schedule."""

import preconditioning
import pytest
import torch
import training
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

OPTIONS = {"damping": 0.01, "factor_decay": 0.8, "update_every": 2, "inverse_every": 3, "kl_clip": 1e-3}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
STEPS = 8


def trained(rank, world, kind, attach, options, steps=STEPS, step=None, scaler=None):
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
        if scaler:
            scaler.unscale_(optimizer)
        if attach is None:
            method.step()
        optimizer.step()
        if scaler:
            scaler.update()
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


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        (2, "KFAC"),
        (3, "DPKFAC"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1, "KFAC"), (1, "DPKFAC"), (2, "DPKFAC"), (3, "KFAC"))
        ),
    ],
)
def test_golden(request, world, kind):
    pool = request.getfixturevalue(f"pool{world}")
    for attach in (None, OWNED, {}):
        pool.run(equal_to_golden, kind, "cholesky", attach)
    pool.run(equal_to_golden, kind, "eigen", OWNED)


IN_TWO_LEVELS = {**OWNED, "hierarchy": 2, "algorithm": "native"}


@pytest.mark.parametrize("kind", ["KFAC", "DPKFAC"])
def test_in_two_levels(pool4, kind):
    for attach in ({**OWNED, "hierarchy": 2}, IN_TWO_LEVELS):
        pool4.run(equal_to_golden, kind, "cholesky", attach)


def scaled(rank, world, scaler):
    """A loss that was multiplied, as GradScaler does, changes nothing but rounding."""

    def backward(model, x, y):
        loss = torch.nn.functional.mse_loss(model(x), y)
        (scaler.scale(loss) if scaler else loss).backward()

    options = {**OPTIONS, "grad_scaler": scaler}
    return trained(rank, world, "KFAC", None, options, step=backward, scaler=scaler)[0]


def test_a_scaled_loss(pool1):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    (plain,), (have,) = pool1.run(scaled, None), pool1.run(scaled, scaler)
    same(have, plain)


def in_16_bits(rank, world, attach):
    """Under autocast the layers compute in bfloat16, and factors are float32 all the same."""
    model = DDP(preconditioning.build().float().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    method = precondition.DPKFAC(inverse_every=2)
    engine = dear.attach(model, optimizer, preconditioner=method, **attach) if attach else None
    if engine is None:
        precondition.register(model, optimizer, method)
    losses = []
    for _ in range(12):
        x, y = (each.to(place()) for each in preconditioning.batch(rank, 0, torch.float32))
        with torch.autocast(place().type, torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        if engine is None:
            method.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held = [tensor for own in method._binding._running.values() for tensor in own.tensors().values()]
    assert held and all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in held)
    (engine.detach if engine else method.release)()
    assert losses[-1] < 0.9 * losses[0]


def test_autocast(pool2):
    pool2.run(in_16_bits, None)
    pool2.run(in_16_bits, OWNED)


def on_models(rank, world):
    """Models that read their parameters in uncommon ways: the schedule does what plain DDP does."""
    for name, ddp in (
        ("Unused", {"find_unused_parameters": True}), ("StaticallyUnused", {"static_graph": True}),
        ("Checkpointed", {}), ("Tied", {}), ("Frozen", {}), ("MixedTypes", {}), ("Functional", {}), ("Attention", {}),
    ):  # fmt: skip
        found = []
        for attach in (None, OWNED):
            method = precondition.KFAC(inverse_every=2)
            model, optimizer = training.build(name, (torch.optim.SGD, {"lr": 0.02}), ddp)
            engine = dear.attach(model, optimizer, preconditioner=method, **attach) if attach else None
            if engine is None:
                precondition.register(model, optimizer, method)
            for step in range(4):
                training.loss_of(model, rank, step).backward()
                if engine is None:
                    method.step()
                optimizer.step()
                optimizer.zero_grad()
            found.append({key: value.clone() for key, value in model.module.state_dict().items()})
            (engine.detach if engine else method.release)()
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


def test_models(pool2):
    pool2.run(on_models)


def on_digits(rank, world, kind):
    """The mean loss of the last steps of a small network on handwritten digits."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pictures, dtype=torch.float32)[rank::world] / 16, torch.tensor(labels)[rank::world]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.AvgPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(128, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10),
    )  # fmt: skip
    model = DDP(net.to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = getattr(precondition, kind)(inverse_every=5) if kind else None
    losses = []
    with dear.attach(model, optimizer, preconditioner=method):
        for step in range(60):
            at = slice(32 * step % 800, 32 * step % 800 + 32)
            loss = torch.nn.functional.cross_entropy(model(x[at].to(place())), y[at].to(place()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses[-15:]) / 15


@pytest.mark.slow
def test_losses_on_digits(pool2):
    """At equal steps and the same learning rate both reach less than half of plain SGD's loss."""
    pytest.importorskip("sklearn")
    sgd, kfac, dp_kfac = (sum(pool2.run(on_digits, kind)) / 2 for kind in (None, "KFAC", "DPKFAC"))
    assert max(kfac, dp_kfac) < 0.5 * sgd, (sgd, kfac, dp_kfac)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"damping": 0}, "damping must be a positive number"),
        ({"factor_decay": 1.0}, "factor_decay must be at least 0 and below 1"),
        ({"update_every": 0}, "update_every must be a number of steps"),
        ({"inverse_every": 2.5}, "inverse_every must be a number of steps"),
        ({"kl_clip": -1.0}, "kl_clip must be a positive number"),
        ({"solver": "qr"}, 'solver must be "cholesky" or "eigen"'),
    ],
)
def test_arguments_that_cannot_be(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        precondition.KFAC(**options)


@pytest.mark.parametrize("kind", [precondition.KFAC, precondition.DPKFAC, precondition.Eva])
def test_what_scales_no_loss(kind):
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.GradScaler, not int"):
        kind(grad_scaler=3)
