"""Under update="owned" a step is given some parameters: it must know them, and not let one depend on the others."""

from __future__ import annotations

import copy
from typing import Any

import own_optimizers
import torch
import torch.distributed as dist
import training
from own_optimizers import APART, JOINT
from refusing import refused
from torch import nn

import dear
from dear import _joint_steps

SMALL = {"bucket_cap_mb": 0.002, "update": "owned"}


def build(updates: Any) -> Any:
    model, opt = training.build("Mlp", (own_optimizers.Written, {"updates": updates}), {})
    for number, param in enumerate(model.parameters()):
        param.scale = 1.0 + number
    return model, opt


def trained(updates: Any, rank: int, attach: dict[str, Any] | None) -> list[torch.Tensor]:
    model, opt = build(updates)
    engine = dear.attach(model, opt, **attach) if attach else None
    for step in range(5):
        training.plain_step(model, opt, rank, step)
    if engine:
        engine.detach()
    return [param.detach().clone() for param in model.parameters()]


def apart(rank: int, world: int) -> None:
    for updates in APART:
        for have, want in zip(trained(updates, rank, SMALL), trained(updates, rank, None), strict=True):
            if updates in (own_optimizers.batched_muon,):  # a batch of what a rank owns is another batch
                torch.testing.assert_close(have, want)
            else:
                assert torch.equal(have, want), updates.__name__


def test_optimizers_that_update_each_parameter_on_its_own(pool2):
    pool2.run(apart)


def joint(rank: int, world: int, updates: Any) -> None:
    """Every rank finds it, though some own one parameter of a kind alone."""
    model, opt = build(updates)
    engine = dear.attach(model, opt, **SMALL)
    with refused(RuntimeError, "lets the update of .* depend on the parameters beside it"):
        for step in range(5):
            training.plain_step(model, opt, rank, step)
    dist.barrier()
    engine.__exit__(RuntimeError, None, None)


def test_optimizers_whose_parameters_depend_on_one_another(pool2):
    for updates in JOINT:
        pool2.run(joint, updates)


def test_steps_that_are_tried_leave_no_trace():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (4, 4), (2,))]
    for param in params:
        param.grad = torch.randn_like(param)
    opt = own_optimizers.Written(params, own_optimizers.lamb)
    opt.step()
    before = copy.deepcopy((params, [param.grad for param in params], [opt.state[param] for param in params]))
    places = [param.data_ptr() for param in params]

    def run(groups: Any, state: Any) -> None:
        opt.param_groups, kept = groups, (opt.param_groups, opt.state)
        opt.state = state
        opt.step()
        opt.param_groups, opt.state = kept

    assert _joint_steps.find_joint(run, opt.param_groups, opt.state) is None
    after = (params, [param.grad for param in params], [opt.state[param] for param in params])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert places == [param.data_ptr() for param in params]


def test_how_often_steps_are_tried():
    tried = [step for step in range(1, 5000) if _joint_steps.is_tried(step)]
    assert tried[:5] == [1, 2, 4, 8, 16]
    assert tried[-4:] == [1024, 2048, 3072, 4096]
    assert len(tried) < 16
