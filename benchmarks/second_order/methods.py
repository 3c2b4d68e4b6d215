"""What is compared: an optimizer, alone or behind a preconditioner, on DDP or under this library's schedule."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..command import listed as comma_separated
from ..training.strategies import Strategy, StrategyError
from ..training.trainer import OptimizerFactory, Trainer, listed, optimizer_factory
from .rivals import RIVALS

FORMS = "METHOD/ddp[@LR], METHOD/dear[@LR] or RIVAL/ddp[@LR]"


@dataclass(frozen=True)
class Method:
    """An optimizer by the name of the training benchmark's, and what changes gradients before it."""

    optimizer: str
    learning_rate: float
    preconditioner: str | None = None  # a class of this library's package precondition


# Eva and FOOF divide most of a gradient by their damping, 0.03: that much smaller is their learning rate.
METHODS = {
    "sgd": Method("momentum", 0.05),
    "adam": Method("adamw", 1e-3),
    "muon": Method("muon", 0.02),
    "kfac": Method("momentum", 0.05, "KFAC"),
    "dpkfac": Method("momentum", 0.05, "DPKFAC"),
    "eva": Method("momentum", 0.0015, "Eva"),
    "foof": Method("momentum", 0.0015, "FOOF"),
    "shampoo": Method("momentum", 0.05, "Shampoo"),
}


@dataclass
class Stepped(Trainer):
    """Preconditions by itself, between the backward pass and the optimizer's step, where no engine does."""

    preconditioner: Any = None

    def step(self, inputs: Any, targets: Any) -> float:
        loss = self.loss(self.model(inputs), targets)
        loss.backward()
        if self.preconditioner is not None and self.engine is None:
            self.preconditioner.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def stats(self) -> dict[str, Any]:
        """The engine's account, or the preconditioner's on plain DDP."""
        if self.preconditioner is not None and self.engine is None:
            return dict(self.preconditioner.plain.binding.stats())
        return super().stats()

    @property
    def binding(self) -> Any:
        """The preconditioner at work; None without one."""
        if self.engine is None:
            return None if self.preconditioner is None else self.preconditioner.plain.binding
        return self.engine._attached.preconditioning


@dataclass(frozen=True)
class MethodOn(Strategy):
    """A method on plain DDP, or under the schedule."""

    method: str = "sgd"
    scheduled: bool = False
    learning_rate: float | None = None

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Stepped:
        import dear
        import precondition

        model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True)
        if self.method in RIVALS:
            return Stepped(model, RIVALS[self.method].build(net, self.learning_rate))
        kind = METHODS[self.method]
        own = optimizer_factory(kind.optimizer, self.learning_rate or kind.learning_rate)(model)
        preconditioner = getattr(precondition, kind.preconditioner)() if kind.preconditioner else None
        if self.scheduled:
            engine = dear.attach(model, listed(own), preconditioner=preconditioner)
            return Stepped(model, own, engine, preconditioner=preconditioner)
        if preconditioner is not None:
            precondition.register(model, listed(own), preconditioner)
        return Stepped(model, own, preconditioner=preconditioner)


def parse_method(name: str) -> MethodOn:
    """The method of that name. Raises StrategyError."""
    rest, _, rate = name.partition("@")
    method, _, where = rest.partition("/")
    read: Callable[[str], float] = float
    places = ("ddp", "dear") if method in METHODS else ("ddp",) if method in RIVALS else ()
    try:
        if where not in places or (rate and not 0 < read(rate) < float("inf")):
            raise ValueError(name)
        return MethodOn(name, None, method, where == "dear", read(rate) if rate else None)
    except ValueError:
        raise StrategyError(
            f"{name!r} is not known: the forms are {FORMS}, where METHOD is one of {', '.join(METHODS)}, and RIVAL one "
            f"of {', '.join(RIVALS)}."
        ) from None


#: Of this library, on DDP and under the schedule.
ALL = ",".join(f"{method}/{where}" for method in METHODS for where in ("ddp", "dear"))


def method_names(text: str) -> list[str]:
    """Of a command line: methods, each at most once, which must all be known."""
    try:
        return [parse_method(name).name for name in comma_separated(str)(text)]
    except StrategyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
