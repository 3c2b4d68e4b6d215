"""Steps of the user's own under update="owned": what they may do later, and must not do at any time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import training
from refusing import refused
from torch import nn, optim

import dear
from dear._own_steps import has_own_step

SMALL = {"bucket_cap_mb": 0.002, "update": "owned"}
FROM = 3  # the step in which it begins: all that is done at first is over


class Own(optim.Optimizer):
    """Gradient descent with a decay of weights; a subclass does something else now and then."""

    dear_whole = True

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["steps"] = state.get("steps", 0) + 1
                    if state["steps"] > FROM:
                        self.change(param, group)
                    param.add_(param.grad, alpha=-group["lr"])
        return loss

    def change(self, param: Any, group: Any) -> None:
        """What is done from some step on."""


class InPlace(Own):
    def change(self, param: Any, group: Any) -> None:
        param.grad.add_(param, alpha=0.1)


class OfMatricesAlone(Own):
    """Some ranks have none in some group."""

    def change(self, param: Any, group: Any) -> None:
        if param.dim() == 2:
            param.grad.mul_(0.5)


class ThroughData(Own):
    """As optimizers were written once: no version counter shows it."""

    def change(self, param: Any, group: Any) -> None:
        param.grad.data.add_(param.data, alpha=0.1)


class Another(Own):
    def change(self, param: Any, group: Any) -> None:
        param.grad = param.grad + 0.1 * param


class InOptions(Own):
    def change(self, param: Any, group: Any) -> None:
        group["calls"] = group.get("calls", 0) + 1


class InOptionsDeep(Own):
    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["buffer"] = [[0, 0.0] for _ in range(2)]

    def change(self, param: Any, group: Any) -> None:
        group["buffer"][1][0] += 1


class Counting(Own):
    calls = 0

    def change(self, param: Any, group: Any) -> None:
        self.calls += 1


class OfNobody(Own):
    def change(self, param: Any, group: Any) -> None:
        self.state["all"]["calls"] = 1


class Drawing(Own):
    def change(self, param: Any, group: Any) -> None:
        param.add_(torch.randn_like(param), alpha=0.01)


class Asking(Own):
    """One collective more than the others make."""

    def change(self, param: Any, group: Any) -> None:
        dist.all_reduce(param.norm(), group=self.alone)


class Dropping(Own):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if self.state[param]["steps"] > FROM:
                    param.grad = None


class KeepingGradients(Own):
    """Plain DDP makes others after zero_grad()."""

    def change(self, param: Any, group: Any) -> None:
        self.state[param]["before"] = [param.grad[:1]]


class Straying(Own):
    """Has the parameters from somewhere else."""

    def change(self, param: Any, group: Any) -> None:
        self.all[0].mul_(0.99)
        self.all[-1].mul_(0.99)


class Searching(Own):
    """Asks its closure again, where it is given one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        if closure is not None:
            with torch.enable_grad():
                return closure()
        return None


class OfTheLoss(Own):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if loss is not None:
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(1 - 0.1 * loss)
        return loss


def trained(kind: type, rank: int, attach: dict[str, Any] | None, steps: int = 7) -> list[Any]:
    model, opt = training.build("Mlp", (kind, {}), {})
    engine = dear.attach(model, opt, **attach) if attach else None
    for step in range(steps):
        training.plain_step(model, opt, rank, step)
    if engine:
        engine.detach()
    return [param.detach().clone() for param in model.parameters()]


def changes_gradients(rank: int, world: int, kind: type) -> None:
    for have, want in zip(trained(kind, rank, SMALL), trained(kind, rank, None), strict=True):
        assert torch.equal(have, want)
    model, opt = training.build("Mlp", (kind, {}), {})
    dear.attach(model, opt, **SMALL)
    for step in range(FROM + 1):
        training.loss_of(model, rank, step).backward()
        opt.step()
        if step < FROM:
            opt.zero_grad()
    with refused(RuntimeError, "was changed other than by a factor, and not zeroed"):
        training.loss_of(model, rank, FROM + 1).backward()


def test_gradients_that_are_changed_in_a_later_step(pool2, pool3):
    for kind in (InPlace, OfMatricesAlone, ThroughData, Another):
        pool2.run(changes_gradients, kind)
    pool3.run(asked_of_gradients)


def asked_of_gradients(rank: int, world: int) -> None:
    """After the step every rank asks for the norm of gradients that one rank has changed: all of them answer it."""
    norms = []
    for attach in (None, SMALL):
        model, opt = training.build("Mlp", (OfMatricesAlone, {}), {})
        engine = dear.attach(model, opt, **attach) if attach else None
        for step in range(6):
            training.loss_of(model, rank, step).backward()
            before = [param.grad.norm() for param in model.parameters()]
            opt.step()
            norms.append(torch.stack([*before, *(param.grad.norm() for param in model.parameters())]))
            opt.zero_grad()
        if engine:
            engine.detach()
    for want, have in zip(norms[:6], norms[6:], strict=True):
        torch.testing.assert_close(have, want)


class ByNumber(Own):
    """Its groups have a list beside that of their parameters."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["factors"] = [1.0 + number for number in range(len(group["params"]))]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param, factor in zip(group["params"], group["factors"], strict=False):
                param.add_(param.grad, alpha=-group["lr"] * factor)


def by_number(rank: int, world: int) -> None:
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)  # one rank owns all that is updated, and the other must hear of it as well
    model = nn.parallel.DistributedDataParallel(net)
    opt = ByNumber(net.parameters())
    engine = dear.attach(model, opt, **SMALL)
    model(torch.ones(1, 2)).sum().backward()
    with refused(RuntimeError, "may use the option factors of a parameter group"):
        opt.step()
    dist.barrier()
    engine.__exit__(RuntimeError, None, None)


def test_options_that_are_listed_by_parameter(pool2):
    pool2.run(by_number)


MISDEEDS = {
    InOptions: "changes options of its parameter groups",
    InOptionsDeep: "changes options of its parameter groups",
    Counting: "keeps something in the optimizer beside its state",
    OfNobody: "keeps state of something else than its parameters",
    Drawing: "draws random numbers",
    Asking: "communicates with other ranks",
    Dropping: "has set the .grad of a parameter to None",
    KeepingGradients: "keeps a gradient itself in its state",
    Straying: "changes parameters that it was not given",
}


def misdeed(rank: int, world: int, kind: type, sentence: str) -> None:
    model, opt = training.build("Mlp", (kind, {}), {})
    opt.alone = [dist.new_group([each]) for each in range(world)][rank]
    opt.all = list(model.parameters())
    engine = dear.attach(model, opt, **SMALL)
    for step in range(FROM):
        training.plain_step(model, opt, rank, step)
    training.loss_of(model, rank, FROM).backward()
    with refused(RuntimeError, sentence):
        opt.step()
    dist.barrier()  # every rank has found it by itself
    engine.__exit__(RuntimeError, None, None)


def test_what_a_step_of_ones_own_must_not_do_in_a_later_step(pool2):
    for kind, sentence in MISDEEDS.items():
        pool2.run(misdeed, kind, sentence)


def with_closures(rank: int, world: int, kind: type, sentence: str | None) -> None:
    def stepped(kind: type, attach: dict[str, Any] | None) -> list[torch.Tensor]:
        model, opt = training.build("Mlp", (kind, {}), {})
        engine = dear.attach(model, opt, **attach) if attach else None
        for step in range(6):

            def closure(step: int = step) -> torch.Tensor:
                opt.zero_grad()
                loss = training.loss_of(model, rank, step)
                loss.backward()
                return loss

            if step % 2:
                opt.step(closure)
                opt.zero_grad()
            else:
                training.plain_step(model, opt, rank, step)
        if engine:
            engine.detach()
        return [param.detach().clone() for param in model.parameters()]

    if sentence is None:
        assert all(map(torch.equal, stepped(kind, SMALL), stepped(kind, None)))
        return
    with refused(RuntimeError, sentence):
        stepped(kind, SMALL)
    dist.barrier()


def test_closures_that_are_passed_sometimes(pool2):
    pool2.run(with_closures, Own, None)
    pool2.run(with_closures, Searching, "calls its closure other than once")
    pool2.run(with_closures, OfTheLoss, "uses the loss that its closure returns")


class Subclass(optim.AdamW):
    dear_whole = True


class Overriding(optim.AdamW):
    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return super()._init_group(*args, **kwargs)


def test_whose_code_a_step_is():
    params = [nn.Parameter(torch.ones(2))]
    for kind, own in ((optim.AdamW, False), (optim.SGD, False), (Subclass, False), (Overriding, True), (Own, True)):
        assert has_own_step(kind(params, lr=0.1)) == own, kind
    opt = optim.AdamW(params)
    optim.lr_scheduler.StepLR(opt, 1)  # which wraps the step
    assert not has_own_step(opt)
    opt = Own(params)
    optim.lr_scheduler.StepLR(opt, 1)
    assert has_own_step(opt)
