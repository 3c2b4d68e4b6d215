"""What the schedule needs of a preconditioner: the interface that :mod:`precondition` implements, and nothing of its
inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C
from dear.collectives import Algorithm

Param = torch.nn.Parameter
REGISTERED = "_dear_preconditioner"  # the attribute of a module that has one on plain DDP: its class's name


@dataclass(frozen=True)
class Team:
    """Parameters whose gradients are changed together, as a layer's weight and bias, so that one rank must own them."""

    name: str
    params: tuple[Param, ...]
    cost: float  # of the change, in any unit, equal on every rank


@dataclass(frozen=True)
class Run:
    """Elements ``[start, stop)`` of a parameter, in the order of its memory, and where their averaged gradient is: of a
    whole parameter in its shape, otherwise flat."""

    param: Param
    start: int
    stop: int
    grad: Tensor


@dataclass(frozen=True)
class Site:
    """Where a preconditioner is put to work."""

    model: torch.nn.Module
    params: Sequence[Param]  # those whose gradients are averaged
    optimizers: Sequence[torch.optim.Optimizer]
    group: dist.ProcessGroup
    device: torch.device
    update: str  # the strategy's name
    reduce_lane: _C.Lane  # the schedule's own: exchanges of the preconditioner's go behind the gradients of a pass
    gather_lane: _C.Lane
    algorithm: Algorithm  # of the lanes


class Binding(Protocol):
    """A preconditioner at work under the schedule. Called from the training thread, in this order at each step."""

    @property
    def preconditioner(self) -> Preconditioner | None:
        """Whose binding this is; None where nothing is preconditioned."""

    @property
    def teams(self) -> Sequence[Team]:
        """See :meth:`Preconditioner.teams`."""

    def assigned(self, owner: dict[Param, int]) -> None:
        """Who owns the parameters of the teams in a new layout. Collective; at the end of a backward pass."""

    def backward_ended(self) -> None:
        """A backward pass that is reduced has ended on this rank, also one that no step will use. Collective; what is
        submitted to a lane here goes behind the gradients."""

    def dropped(self) -> None:
        """No step will use the backward passes since the last one: what was learnt of them is forgotten."""

    def begin(self) -> None:
        """A step begins. Its gradients may still be on their way. Collective."""

    def precondition(self, runs: Sequence[Run]) -> None:
        """Changes averaged gradients in place, where they can be: once for each fusion group, in the order of their
        reductions, with this rank's runs of it. A team may come in two of them."""

    def end(self) -> set[Param]:
        """All of this rank's gradients have come. Collective; what could not be changed before is changed here, and
        what was may be scaled. Returns the parameters whose gradients any rank has changed."""

    def stats(self) -> dict[str, Any]:
        """What is added to :meth:`dear.Engine.stats`."""

    def release(self) -> None:
        """Takes everything off the model, and leaves the preconditioner with what it has learnt."""


class Preconditioner(Protocol):
    """What :func:`dear.attach` takes as ``preconditioner``."""

    #: The update strategies that it can work under, the usual one first.
    updates: Sequence[str]

    def check_new(self, model: DDP, optimizers: Sequence[torch.optim.Optimizer], caller: str) -> dict[str, Any]:
        """Refuses what cannot become the preconditioner of this model; returns what must be equal on every rank."""

    def teams(self, model: DDP) -> Sequence[Team]:
        """What one rank must own together, of a model that was checked."""

    def bind_to_schedule(self, site: Site) -> Binding:
        """Puts the preconditioner to work. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state, on every rank. Collective."""

    def load_state_dict(self, state: Any) -> None:
        """Takes it, at any world size; every rank alike."""


class Unpreconditioned:
    """The binding of no preconditioner."""

    preconditioner = None
    teams: Sequence[Team] = ()

    def assigned(self, owner: dict[Param, int]) -> None: ...

    def backward_ended(self) -> None: ...

    def dropped(self) -> None: ...

    def begin(self) -> None: ...

    def precondition(self, runs: Sequence[Run]) -> None: ...

    def end(self) -> set[Param]:
        return set()

    def stats(self) -> dict[str, Any]:
        return {}

    def release(self) -> None: ...


def check_kind(thing: Any, caller: str) -> None:
    """Refuses what is no preconditioner.

    Raises:
        TypeError: one sentence says what it is instead.
    """
    if hasattr(thing, "bind_to_schedule") and hasattr(thing, "teams"):
        if not isinstance(thing, type):
            return
        raise TypeError(f"{thing.__name__} is a class; pass an instance, such as precondition.{thing.__name__}().")
    raise TypeError(f"{caller} needs a preconditioner, such as precondition.DPKFAC(), not {type(thing).__name__}.")


def check_free(model: DDP) -> None:
    """Refuses a model for which a preconditioner is registered.

    Raises:
        ValueError: one sentence names its class.
    """
    other = getattr(model, REGISTERED, None)
    if other is not None:
        raise ValueError(
            f"precondition.register() has put a {other} on this model already, which takes one preconditioner: call "
            "release() on that one first."
        )
