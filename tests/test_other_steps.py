"""Optimizers and the attached one beside each other: one that takes its place trains as under plain DDP, and the
engine's state, which is not its, says so; and what is updated late changes nothing of the user's object."""

from __future__ import annotations

import gc

import pytest
import torch
import training
from silence import check_told, told
from torch.optim.optimizer import _global_optimizer_pre_hooks

import dear
from dear import _C
from dear._optimizer import UserOptimizer

SENTENCE = r"The last \d steps were those of AdamW, which is not attached"


def lasting(model):
    """Another optimizer of the same parameters."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@told
def replaced(rank, world, update):
    before = len(_global_optimizer_pre_hooks)
    plain, plain_opt = training.build("Mlp", training.SGD, {})
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **training.SMALL)
    for step in range(2):
        training.plain_step(plain, plain_opt, rank, step)
        training.plain_step(model, opt, rank, step)
    plain_opt, other = lasting(plain), lasting(model)
    for step in range(2, 5):
        training.plain_step(plain, plain_opt, rank, step)
        training.plain_step(model, other, rank, step)
    for one, another in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, another)
    with pytest.raises(RuntimeError, match=SENTENCE):
        engine.state_dict()
    engine.state_dict(optimizer=False)
    opt.state_dict()  # of the optimizer named
    training.plain_step(model, opt, rank, 5)
    engine.state_dict()
    engine.detach()
    assert len(_global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("update", ["replicated"])
def test_the_state_of_an_optimizer_that_was_replaced_is_not_the_runs(pool2, update):
    check_told(pool2, replaced, update)


@told
def alone(rank, world):
    """Where nothing is reduced, too."""
    group = [torch.distributed.new_group([one]) for one in range(world)][rank]
    model, opt = training.build("Mlp", training.SGD, {"process_group": group})
    engine, other = dear.attach(model, opt), lasting(model)
    for step in range(3):
        training.plain_step(model, other, rank, step)
    with pytest.raises(RuntimeError, match=SENTENCE):
        engine.state_dict()
    engine.detach()


def test_a_single_rank_has_its_optimizer_replaced(pool2):
    check_told(pool2, alone)


class Around(torch.optim.Optimizer):
    """SAM and Lookahead are made so: their groups are those of another optimizer that makes the steps."""

    def __init__(self, params, kind, **options):
        super().__init__(params, options)
        self.base = kind(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def second_step(self):
        self.base.step()

    def step(self, closure=None):
        self.base.step()


@told
def in_turn(rank, world):
    """Steps that are nobody's fault: of one around the other, in turn with the attached one's, of other parameters."""
    model, _ = training.build("Mlp", training.SGD, {})
    opt = Around(model.parameters(), torch.optim.SGD, lr=0.05)
    engine = dear.attach(model, opt, update="replicated", **training.SMALL)
    for step in range(3):
        training.loss_of(model, rank, step).backward()
        opt.second_step()
        opt.zero_grad()
    engine.state_dict()
    engine.detach()

    model, opt = training.build("Mlp", training.SGD, {})
    apart, apart_opt = training.build("Mlp", training.SGD, {})
    engine, other = dear.attach(model, opt, update="replicated", **training.SMALL), lasting(model)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
        training.plain_step(model, other, rank, step)
        for _ in range(2):
            training.plain_step(apart, apart_opt, rank, step)
    engine.state_dict()
    engine.detach()


def test_steps_of_others_that_are_in_order(pool2):
    check_told(pool2, in_turn)


@told
def dropped(rank, world):
    before = len(_global_optimizer_pre_hooks)
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, **training.SMALL)
    training.plain_step(model, opt, rank, 0)
    engine.synchronize()
    del engine, model, opt
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before


def test_an_engine_that_is_dropped_looks_no_longer(pool2):
    check_told(pool2, dropped)


def test_an_update_that_is_late_leaves_the_users_optimizer_alone():
    """It may run on a thread that reads a parameter, while another one changes the learning rate."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.9)
    user = UserOptimizer(optimizer)
    groups, state = optimizer.param_groups, optimizer.state
    seen = []

    class Watching(dict):
        def __missing__(self, key):
            seen.append((optimizer.param_groups is groups, optimizer.state is state))
            return self.setdefault(key, {})

    memory = param.detach().clone()
    memory.grad = torch.ones(3)
    user.run_aside([{**groups[0], "params": [memory], "lr": 1.0}], Watching(), user.attributes())
    assert torch.equal(memory, torch.zeros(3)) and torch.equal(param, torch.ones(3))
    assert seen and all(map(all, seen)), seen


def test_a_gradient_is_put_where_another_stands_and_nowhere_else():
    param, one, other = torch.nn.Parameter(torch.ones(3)), torch.ones(3), torch.zeros(3)
    param.grad = one
    assert _C.exchange_grad(param, one, other) and param.grad is other
    assert not _C.exchange_grad(param, one, one) and param.grad is other
    param.grad = None  # as another thread may have done meanwhile
    assert not _C.exchange_grad(param, other, one) and param.grad is None
