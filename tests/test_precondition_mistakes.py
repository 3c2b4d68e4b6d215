"""Mistakes with a preconditioner that would otherwise train without it, or twice with it, and say nothing."""

from __future__ import annotations

import warnings

import preconditioning
import pytest
import torch
from place import place
from refusing import refused
from test_precondition import plain_backward
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition

KINDS = ("DPKFAC", "Eva", "Shampoo")


def fresh(method):
    model = DDP(preconditioning.build().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    precondition.register(model, optimizer, method)
    return model, optimizer


def said(model, rank, steps, between=lambda: None):
    """What is warned of in so many passes, with nobody's optimizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(steps):
            plain_backward(model, *(each.to(place()) for each in preconditioning.batch(rank, number)))
            between()
            model.zero_grad()
    return [str(each.message) for each in caught if "preconditioner.step()" in str(each.message)]


def forgotten(rank, world, kind):
    method = getattr(precondition, kind)()
    model, _ = fresh(method)
    model.eval()
    assert not said(model, rank, 3), "nothing is trained in eval mode"
    model.train()
    with model.no_sync():
        assert not said(model, rank, 3), "these are accumulated"
    with torch.no_grad():
        model(preconditioning.batch(rank, 0)[0].to(place()))
    assert not said(model, rank, 20)
    (message,) = said(model, rank, 25)
    assert message.startswith("preconditioner.step() was not called in 20 backward passes")
    method.release()
    assert not model._forward_pre_hooks


def remembered(rank, world, kind):
    method = getattr(precondition, kind)()
    model, _ = fresh(method)
    assert not said(model, rank, 19)
    assert not said(model, rank, 25, method.step)
    assert not said(model, rank, 25), "who has called it once knows it"
    method.release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_never_called_is_warned_of_once(pool2, kind):
    pool2.run(forgotten, kind)


def test_a_step_that_is_called_is_not_warned_of(pool2):
    pool2.run(remembered, "Eva")


def twice(rank, world):
    first = precondition.DPKFAC()
    model, optimizer = fresh(first)
    for second in (precondition.Eva(), precondition.DPKFAC()):
        with refused(ValueError, r"precondition\.register\(\) has put a DPKFAC on this model already"):
            precondition.register(model, optimizer, second)
        with refused(ValueError, r"has put a DPKFAC on this model already.*call release\(\)"):
            dear.attach(model, optimizer, preconditioner=second)
    first.release()
    precondition.register(model, optimizer, second)
    second.release()
    dear.attach(model, optimizer, preconditioner=second).detach()


def test_a_model_takes_one_preconditioner(pool2):
    pool2.run(twice)


@pytest.mark.parametrize("kind", [precondition.DPKFAC, precondition.KFAC])
def test_a_keyword_that_is_no_option_is_named_with_those_that_are(kind):
    with refused(TypeError, f"{kind.__name__} has no option dampening: it takes damping, factor_decay,"):
        kind(dampening=0.1)


class Mine(torch.optim.SGD):
    """Of a class of the user's."""

    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


def without_owners(rank, world):
    """Nobody has given an update or a compressor, so the sentence speaks of what was given."""

    def patched(params):
        optimizer = torch.optim.SGD(params, lr=0.01)
        step = optimizer.step
        optimizer.step = lambda closure=None: step(closure)
        return optimizer

    def tried(make, reason):
        model = DDP(preconditioning.build().to(place()))
        optimizer = make(model.parameters())
        for kind in KINDS:
            with refused(ValueError, f'update="auto" is "replicated" with {reason}'):
                dear.attach(model, optimizer, preconditioner=getattr(precondition, kind)())
        return model, optimizer

    by_step = r"whose step\(\) is not torch's own, and a .*owners are: use update=\"owned\" if the .* or leave"
    tried(lambda params: Mine(params, lr=0.01), f"Mine, {by_step}")
    model, optimizer = tried(patched, f"SGD, {by_step}")
    dear.attach(model, optimizer, preconditioner=precondition.DPKFAC(), update="owned").detach()
    tried(torch.optim.LBFGS, "LBFGS, and a .* owners are: leave preconditioner out")


def test_an_optimizer_that_leaves_no_owners_is_named(pool2):
    pool2.run(without_owners)
