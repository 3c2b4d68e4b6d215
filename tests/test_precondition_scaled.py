"""Preconditioners beside a GradScaler: gradients that nobody has unscaled, and steps that it skips."""

import contextlib

import pytest
import torch
from place import place
from refusing import refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

KINDS = ("KFAC", "DPKFAC", "Eva", "FOOF", "Shampoo")
TOLD = ("KFAC", "DPKFAC", "Eva")  # they take grad_scaler
OPTIONS = {kind: {"update_every": 2, "inverse_every": 3} for kind in ("KFAC", "DPKFAC")}
STILL_SCALED = r"are still multiplied by the scale of grad_scaler: call scaler\.unscale_\(optimizer\) between backward"
INF, BOTH = float("inf"), (0, 1)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4)).double().to(place())


def batch(rank, step):
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank)).to(place())


def make(kind, scaler):
    return getattr(precondition, kind)(**OPTIONS.get(kind, {}), **({"grad_scaler": scaler} if kind in TOLD else {}))


def new_scaler(**options):
    return torch.amp.GradScaler(place().type, init_scale=2.0**10, **options)


class Wrapper:
    """As those of Accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


# --- gradients that are still scaled ---------------------------------------------------------------------------------


def still_scaled(rank, world, kind):
    model, scaler = DDP(small()), new_scaler()
    first = torch.optim.SGD(model.module[0].parameters(), lr=0.05)
    second = torch.optim.Adam([*model.module[2].parameters(), *model.module[4].parameters()], lr=0.05)
    wrapper, method = Wrapper(second), make(kind, scaler)
    precondition.register(model, [first, wrapper], method)
    for step in range(3):
        scaler.scale(model(batch(rank, step)).square().mean()).backward()
        with refused(RuntimeError, f"The gradients of SGD {STILL_SCALED}"):
            method.step()
        scaler.unscale_(first)
        with refused(RuntimeError, f"The gradients of Adam {STILL_SCALED}"):
            method.step()
        if step == 1:
            second.zero_grad()  # what it has not is not scaled
        else:
            scaler.unscale_(second if step else wrapper)
        method.step()
        scaler.step(first)
        scaler.update()
        first.zero_grad()
        second.zero_grad()
    method.release()


@pytest.mark.parametrize("kind", TOLD)
def test_gradients_that_are_still_scaled_are_refused(pool2, kind):
    pool2.run(still_scaled, kind)


def unscaled(rank, world, kind, make_scaler):
    """The loss is not scaled, whatever was given."""
    model, scaler = DDP(small()), make_scaler and make_scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = make(kind, scaler)
    precondition.register(model, optimizer, method)
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
        method.step()
        optimizer.step()
        optimizer.zero_grad()
    method.release()
    return [param.detach().cpu() for param in model.parameters()]


def disabled():
    return new_scaler(enabled=False)


@pytest.mark.parametrize("make_scaler", [disabled, new_scaler])
@pytest.mark.parametrize("kind", TOLD)
def test_a_scaler_that_scales_nothing_has_nothing_to_unscale(pool2, kind, make_scaler):
    want, have = (pool2.run(unscaled, kind, scaler) for scaler in (None, make_scaler))
    for a, b in zip(want[0], have[0], strict=True):
        assert torch.equal(a, b)


def fused(rank, world, kind):
    """It unscales in its own kernel, behind the preconditioner, and is called where others' steps are skipped."""
    found = []
    for fuses in (False, True):
        model, scaler = DDP(small()), new_scaler()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fuses)
        with dear.attach(model, optimizer, preconditioner=make(kind, scaler)):
            for step in range(6):
                loss = model(batch(rank, step)).square().mean()
                scaler.scale(loss * INF if step == 3 and rank else loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        found.append([param.detach() for param in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)
    with dear.attach(model, optimizer, preconditioner=make(kind, scaler)):
        scaler.scale(model(batch(rank, 0)).square().mean()).backward()
        with refused(RuntimeError, r"SGD is fused and divides gradients .*: call scaler\.unscale_\(optimizer\)"):
            scaler.step(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_optimizer_does_not_unscale_behind_the_preconditioner(pool2, kind):
    pool2.run(fused, kind)


# --- steps that are skipped ------------------------------------------------------------------------------------------


def trained(rank, kind, attached, infinite, in_two, in_place=False):
    """Seven steps; in the fourth and the fifth, on some ranks, the loss is infinite, or the first optimizer's gradients
    alone."""
    model, scaler = DDP(small()), new_scaler()
    parts = [model.module[:2], model.module[2:]] if in_two else [model]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.9) for part in parts]
    method = make(kind, scaler)
    with contextlib.ExitStack() as stack:
        if attached:
            stack.enter_context(dear.attach(model, optimizers, preconditioner=method, update=method.updates[0]))
        else:
            precondition.register(model, optimizers, method)
        for step in range(7):
            loss, spoilt = model(batch(rank, step)).square().mean(), step in (3, 4) and rank in infinite
            if spoilt and in_two:
                with model.module[0].bias.register_hook(lambda grad: grad * INF):
                    scaler.scale(loss).backward()
            else:
                scaler.scale(loss * INF if spoilt else loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if not attached:
                method.step()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=not in_place)
        state = method.state_dict()
    method.release()
    return [param.detach().clone() for param in model.parameters()], state["layers"], state.get("steps")


def skipped(rank, world, kind, infinite, in_two):
    (want, learnt, steps), (have, kept, asked) = (trained(rank, kind, way, infinite, in_two) for way in (True, False))
    assert steps == asked
    close = {"rtol": 1e-6, "atol": 1e-9}
    for a, b in zip(want, have, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(b, a, **close)
    assert learnt.keys() == kept.keys()
    for layer, tensors in learnt.items():
        for name, value in tensors.items():
            torch.testing.assert_close(kept[layer][name].cpu(), value.cpu(), **close, msg=f"{layer} {name}")


@pytest.mark.parametrize("infinite", [(1,), BOTH], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_not_learnt_from_on_plain_ddp_either(pool2, kind, infinite):
    pool2.run(skipped, kind, infinite, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_one_of_two_optimizers_makes_is_learnt_from(pool2, kind):
    pool2.run(skipped, kind, (1,), True)


def zeroed_in_place(rank, world, kind):
    want, have = (trained(rank, kind, False, (1,), False, in_place)[0] for in_place in (False, True))
    for a, b in zip(want, have, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_forgotten_where_gradients_are_zeroed_in_place(pool2, kind):
    pool2.run(zeroed_in_place, kind)
