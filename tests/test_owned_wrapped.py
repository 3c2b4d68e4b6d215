"""A step that was put into an optimizer of torch's, and an optimizer around another one, under update="owned"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import training
from refusing import refused
from torch import nn, optim

import dear

SMALL = {"bucket_cap_mb": 0.002, "update": "owned"}


def trained(rank: int, kind: Any, change: Any, attach: dict[str, Any] | None) -> list[torch.Tensor]:
    """The parameters after four steps; ``change`` is made to the optimizer before."""
    model, opt = training.build("Mlp", kind, {})
    change(opt)
    engine = dear.attach(model, opt, **attach) if attach else None
    for step in range(4):
        training.plain_step(model, opt, rank, step)
    if engine:
        assert engine.update == attach.get("update", "replicated")
        engine.detach()
    return [param.detach().clone() for param in model.parameters()]


def put_in_place(rank: int, world: int) -> None:
    """A step that somebody has put into an optimizer of torch's is not torch's."""

    def clipped(optimizer: Any) -> None:
        own = optimizer.step

        def step(closure: Any = None) -> Any:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.01)
            return own(closure)

        optimizer.step = step

    model, opt = training.build("Mlp", training.SGD, {})
    clipped(opt)
    with pytest.raises(ValueError, match="SGD is not known to update each element on its own"):
        dear.attach(model, opt, update="sharded")
    values = [trained(rank, training.SGD, clipped, attach) for attach in (None, {"bucket_cap_mb": 0.002})]
    assert all(map(torch.equal, *values))


def test_a_step_that_was_put_into_an_optimizer(pool2):
    pool2.run(put_in_place)


def put_in_place_owned(rank: int, world: int) -> None:
    """It gets each parameter in its own shape, as a class of the user's does, and not several in one flat tensor."""

    def centred(optimizer: Any) -> None:
        own = optimizer.step

        def step(closure: Any = None) -> Any:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.sub_(param.grad.mean(-1, keepdim=True))
            return own(closure)

        optimizer.step = step

    values = [trained(rank, training.SGD, centred, attach) for attach in (None, SMALL)]
    assert all(map(torch.equal, *values))


def test_a_step_that_was_put_into_an_optimizer_and_owned_updates(pool2):
    pool2.run(put_in_place_owned)


class Slices(nn.Module):
    """Its parameters are slices of one tensor, and so have one version among them."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
        self.layers = nn.ParameterList([nn.Parameter(each) for each in start])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(x @ layer)
        return x


class Kept(torch.Tensor):
    """A tensor of parts, as those of quantised optimizer state are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, part: torch.Tensor) -> Kept:
        return torch.Tensor._make_wrapper_subclass(cls, part.shape)

    def __init__(self, part: torch.Tensor) -> None:
        self.part = part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*(each.part if isinstance(each, Kept) else each for each in args), **(kwargs or {}))
        aten = torch.ops.aten
        return Kept(made) if func in (aten.clone.default, aten.detach.default) else made


class Heavy(optim.Optimizer):
    """Momentum in tensors of parts."""

    dear_whole = True

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = Kept(torch.zeros_like(param))
                state["momentum"].part.mul_(0.9).add_(param.grad)
                param.sub_(state["momentum"].part, alpha=group["lr"])


def not_refused(rank: int, world: int) -> None:
    values = []
    for attach in (None, SMALL | {"bucket_cap_mb": 0.0002}):  # a fusion group for each
        model = nn.parallel.DistributedDataParallel(Slices())
        opt = Heavy(model.parameters())
        engine = dear.attach(model, opt, **attach) if attach else None
        for step in range(4):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        if engine:
            engine.detach()
        values.append([param.detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *values))


def test_parameters_of_one_tensor_and_state_without_memory(pool2):
    pool2.run(not_refused)


class Around(optim.Optimizer):
    """As sharpness-aware minimisation and lookahead are written: around another optimizer of the same groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        self.base = optim.SGD(self.param_groups, lr=0.05)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


def around(rank: int, world: int) -> None:
    model, opt = training.build("Mlp", (Around, {}), {})
    with refused(ValueError, "may call the optimizer in its attribute base"):
        dear.attach(model, opt, **SMALL)

    from torch.distributed.optim import ZeroRedundancyOptimizer  # which imports much, with warnings

    model, _ = training.build("Mlp", training.SGD, {})
    opt = ZeroRedundancyOptimizer(model.parameters(), optim.SGD, lr=0.05)
    with refused(ValueError, "may call the optimizer in its attribute optim"):
        dear.attach(model, opt, **SMALL)


def test_an_optimizer_around_another_one(pool2):
    pool2.run(around)


class ByList(optim.Optimizer):
    """Goes over parameters that it keeps in an attribute."""

    def __init__(self, params: Any, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": 0.05})
        self.all, self.decay = [param for group in self.param_groups for param in group["params"]], decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.all:
            if param.grad is not None:
                param.sub_(param.grad, alpha=0.05)
            elif self.decay:
                param.mul_(1 - self.decay)


def by_list(rank: int, world: int) -> None:
    """What is tried out of such a step moves nothing."""
    kind = (ByList, {})
    values = [trained(rank, kind, lambda opt: None, attach) for attach in (None, {"update": "owned"})]
    assert all(map(torch.equal, *values))


def strays(rank: int, world: int) -> str | None:
    model, opt = training.build("Mlp", (ByList, {"decay": 0.01}), {})
    engine = dear.attach(model, opt, update="owned")
    try:
        for step in range(2):  # a rank that has finished the refused step by then hears of it in its next one
            training.plain_step(model, opt, rank, step)
            engine.synchronize()
    except RuntimeError as error:
        engine.__exit__(RuntimeError, error, None)  # so that the other ranks hear of it
        return str(error)
    return None


def test_a_step_over_parameters_of_an_attribute(pool2):
    pool2.run(by_list)
    found = pool2.run(strays)
    assert all(found) and any("changes parameters that it was not given" in each for each in found), found
