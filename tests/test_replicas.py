"""Replicas are compared every so many steps: ranks that differ, and the parameter, are named on every rank."""

import pytest
import torch
import training
from refusing import refused
from training import SMALL

import dear


def flipped(rank, world, update, on):
    """One bit of a parameter is flipped on these ranks after the second step; every third step compares."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, check_replicas=3, **SMALL)
    for step in range(6):
        if step == 3 and rank in on:
            with torch.no_grad():
                model.module.second.bias.view(torch.int32)[5] ^= 1
            assert engine.stats()["steps"] == 3
        try:
            training.plain_step(model, opt, rank, step)
        except RuntimeError as error:
            return step, str(error)
    engine.detach()
    return None


@pytest.mark.parametrize(
    ("on", "who"), [((), None), ((2,), "rank 2 has"), ((0,), "rank 0 has"), ((1, 3), "ranks 1, 3 have")]
)
def test_replicas_that_differ_are_named(pool4, on, who):
    found = pool4.run(flipped, "replicated", on)
    if who is None:
        assert found == [None] * 4
        return
    assert {step for step, _ in found} == {5} and len(set(found)) == 1
    assert f"The replicas differ after step 6: {who} another second.bias" in found[0][1]


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_code_that_changes_parameters_on_one_rank_is_named(pool2, update):
    """Each rank's part of the parameters becomes everybody's, so behind the update all have the same."""
    pool2.run(clamped, update)


def clamped(rank, world, update):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, check_replicas=3, **SMALL)
    for step in range(3):
        if rank == 1:
            with torch.no_grad():
                model.module.second.bias.add_(1e-3)
        if step == 2:
            with refused(
                RuntimeError, "The replicas differ after step 2: rank 1 has another second.bias than the rest"
            ):
                training.plain_step(model, opt, rank, step)
        else:
            training.plain_step(model, opt, rank, step)
    engine.detach()


def clamped_of_the_second(rank, world):
    """The optimizer that was listed last steps first."""
    model, _ = training.build("Mlp", training.SGD, {})
    first, last = model.module.first.parameters(), [*model.module.second.parameters(), *model.module.last.parameters()]
    a, b = torch.optim.SGD(first, lr=0.05), torch.optim.SGD(last, lr=0.05)
    engine = dear.attach(model, [a, b], update="sharded", check_replicas=1, **SMALL)
    for step in range(3):
        if step == 2 and rank == 1:
            with torch.no_grad():
                model.module.second.bias.add_(1e-3)
        training.loss_of(model, rank, step).backward()
        if step == 2:
            with refused(
                RuntimeError, "The replicas differ after step 2: rank 1 has another second.bias than the rest"
            ):
                b.step()
            break
        b.step()
        a.step()
        a.zero_grad()
        b.zero_grad()
    engine.__exit__(RuntimeError, None, None)


def test_code_that_changes_a_parameter_of_the_optimizer_that_steps_first(pool2):
    pool2.run(clamped_of_the_second)


def by_own_loss(rank, world, update):
    """A schedule that follows each rank's own loss. Sharded, replicas stay equal, each part at a rate of its own."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, check_replicas=3, **SMALL)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    told = rf"Ranks 0 and 1 have another lr of SGD's group 0 after step {{}} \(0\.05 and {0.05 * 0.1}\): set it alike"
    for step in range(3):
        schedule.step(1.0 - 0.1 * step + rank * (step == 2))
        if step == 2:
            with pytest.raises(RuntimeError, match=told.format(3)):
                training.plain_step(model, opt, rank, step)
        else:
            training.plain_step(model, opt, rank, step)
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_learning_rate_of_one_ranks_own_is_told(pool2, update):
    pool2.run(by_own_loss, update)


def off(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    with dear.attach(model, opt, update="replicated", check_replicas=0, **SMALL):
        for step in range(3):
            if step == 1 and rank == 1:
                with torch.no_grad():
                    model.module.last.bias.add_(1)
            training.plain_step(model, opt, rank, step)
    for wrong in (-1, 1.5, True, "often"):
        with pytest.raises(ValueError, match="check_replicas must be a number of steps, or 0 for no check"):
            dear.attach(model, opt, check_replicas=wrong)


def test_the_check_can_be_turned_off_and_refuses_nonsense(pool2):
    pool2.run(off)


def equal(rank, world, update):
    """What is compared is finished, in both strategies, also where gradients are kept until the next pass."""
    training.compare(rank, world, "Mlp", attach={**SMALL, "update": update, "check_replicas": 1})


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_training_is_the_same_with_the_check(pool2, update):
    pool2.run(equal, update)
