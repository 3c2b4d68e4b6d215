"""A run with a preconditioner repeats to the bit, also one that is resumed."""

import io

import preconditioning
import pytest
import torch
from place import place
from test_precondition import OPTIONS, OWNED, SGD, plain_backward
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

MODES = (None, OWNED)


def resumed(rank, world, kind, attach, solver):
    options = {**OPTIONS, "solver": solver}

    def fresh(seed):
        model = DDP(preconditioning.build(seed).to(place()))
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        method = getattr(precondition, kind)(**options)
        engine = dear.attach(model, optimizer, preconditioner=method, **attach) if attach else None
        if engine is None:
            precondition.register(model, optimizer, method)
        return model, optimizer, method, engine

    def steps(run, numbers):
        model, optimizer, method, engine = run
        for number in numbers:
            plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
            if engine is None:
                method.step()
            optimizer.step()
            optimizer.zero_grad()

    def saved(run):
        model, optimizer, method, engine = run
        state = engine.state_dict() if engine else {
            "optimizer": optimizer.state_dict(), "preconditioner": method.state_dict(),
        }  # fmt: skip
        file = io.BytesIO()
        torch.save([model.module.state_dict(), state], file)
        return file

    first = fresh(0)
    steps(first, range(4))  # neither at an inversion nor at a capture
    file = saved(first)
    steps(first, range(4, 8))
    second = fresh(1)
    file.seek(0)
    weights, state = torch.load(file)
    second[0].module.load_state_dict(weights)
    if second[3]:
        second[3].load_state_dict(state)
    else:
        second[1].load_state_dict(state["optimizer"])
        second[2].load_state_dict(state["preconditioner"])
    steps(second, range(4, 8))
    for _, _, method, engine in (first, second):
        (engine.detach if engine else method.release)()
    want = first[0].module.state_dict()
    for name, value in second[0].module.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize(("kind", "solver"), [("DPKFAC", "cholesky"), ("KFAC", "eigen")])
def test_a_resumed_run_goes_on_bit_for_bit(pool2, kind, solver):
    for attach in MODES:
        pool2.run(resumed, kind, attach, solver)


def orders_of_groups(rank, world):
    """The parameters that come to the preconditioner in each step, by fusion group."""
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    engine = dear.attach(model, optimizer, preconditioner=precondition.DPKFAC(), **OWNED)
    names = {param: name for name, param in model.module.named_parameters()}
    binding = engine._attached.preconditioning
    precondition_group, steps = binding.precondition, []

    def spy(runs):
        steps[-1].append([names[run.param] for run in runs])
        precondition_group(runs)

    binding.precondition = spy
    for number in range(20):
        steps.append([])
        plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    return steps


def test_groups_come_in_one_order(pool2):
    """Sums over layers are of one order then, whichever group is reduced first, and a run repeats to the bit."""
    for steps in pool2.run(orders_of_groups):
        assert sum(map(bool, steps[0])) > 1
        assert all(step == steps[0] for step in steps)


def saved_by(rank, world, kind, file):
    """Some steps, and what would be saved behind them; rank 0 writes it."""
    model = DDP(preconditioning.build(0).to(place()))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    engine = dear.attach(model, optimizer, preconditioner=getattr(precondition, kind)(**OPTIONS), **OWNED)
    for number in range(4):
        plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
        optimizer.step()
        optimizer.zero_grad()
    state = engine.state_dict()
    engine.detach()
    if rank == 0:
        torch.save([model.module.state_dict(), state], file)


def went_on(rank, world, kind, file):
    """As many steps of a run that was saved with another number of ranks, and of plain DDP's form of it."""
    found = []
    for attach in MODES:
        weights, state = torch.load(file)  # anew: an optimizer goes on in the tensors that it is given
        model = DDP(preconditioning.build(1).to(place()))
        model.module.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        method = getattr(precondition, kind)(**OPTIONS)
        if attach:
            engine = dear.attach(model, optimizer, preconditioner=method, **attach)
            engine.load_state_dict(state)
            again = engine.state_dict()["preconditioner"]["layers"]
            assert again.keys() == state["preconditioner"]["layers"].keys()
            for layer, kept in state["preconditioner"]["layers"].items():
                assert all(torch.equal(again[layer][key], value) for key, value in kept.items()
                           if isinstance(value, torch.Tensor)), layer  # fmt: skip
        else:
            precondition.register(model, optimizer, method)
            optimizer.load_state_dict(state["optimizer"])
            method.load_state_dict(state["preconditioner"])
        for number in range(4, 8):  # alike on all ranks: DP-KFAC learns from an owner's, and owners are others there
            plain_backward(model, *(each.to(place()) for each in preconditioning.batch(0, number)))
            if not attach:
                method.step()
            optimizer.step()
            optimizer.zero_grad()
        (engine.detach if attach else method.release)()
        found.append({name: value.clone() for name, value in model.module.state_dict().items()})
    plain, owned = found
    for name, value in owned.items():
        torch.testing.assert_close(value, plain[name], msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("kind", ["DPKFAC", "KFAC"])
def test_a_state_goes_on_with_another_number_of_ranks(pool2, pool3, tmp_path, kind):
    """Every layer's factors come to their new owner, and training is that of plain DDP from the same state."""
    file = str(tmp_path / "state.pt")
    pool3.run(saved_by, kind, file)
    pool2.run(went_on, kind, file)
    pool2.run(saved_by, kind, file)
    pool3.run(went_on, kind, file)
