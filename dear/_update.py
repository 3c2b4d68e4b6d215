"""Who updates what between the two halves of an exchange: the interface of the strategies.

Note [Update strategies]
A strategy owns everything that depends on who updates what: what the flat buffers hold, what ``.grad`` shows, the
optimizer's step, what a pending parameter still needs, clipping, and the optimizer's state in and out. The schedule
and the engine know no strategy by name: another one is a file with a subclass of :class:`Update`, and a line in
:mod:`dear._assembly`.

Note [The first update]
An optimizer makes its state in its first update: for all parameters of a call, before it updates the first of them. The
first update is one call for all fusion groups. In a call for each, state that stays for good would lie between the
temporaries of the updates before it, and the C library's heap could reuse little of what these leave: it held up to a
copy of the model more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from dear import _C
from dear._attached import Attached
from dear._fusion import default_group_bytes
from dear._grads import Found, Grads
from dear._layout import Layout
from dear._placeholders import Placeholders
from dear._standing import Standing
from dear.preconditioning import Team


@dataclass(frozen=True)
class Request:
    """What a strategy is asked to serve."""

    optimizers: tuple[Optimizer, ...]
    compresses: bool  # gradients are compressed
    shared: tuple[str, str] | None  # the names of two parameters that share memory
    teams: Sequence[Team] = ()  # that one rank must own together, for a preconditioner

    def refusal_of_aliases(self, update: str) -> str | None:
        """Why a strategy that moves parameters apart cannot serve it, where two share memory."""
        if self.shared is None:
            return None
        first, second = self.shared
        return (
            f'The parameters {first} and {second} share memory, and update="{update}" would part them: make them one '
            'parameter, or use update="replicated".'
        )


def bytes_of(states: Iterable[dict[Any, Any]]) -> int:
    """The memory of the tensors in an optimizer's state, parameter by parameter."""
    return sum(value.nbytes for values in states for value in values.values() if isinstance(value, torch.Tensor))


class Update(ABC):
    """One strategy at work for one engine. Called from the training thread, at a step boundary unless said."""

    kind: ClassVar[str]  #: what ``dear.attach(update=...)`` calls it
    gathers_gradients: ClassVar[bool]  #: the all-gather is of averaged gradients, and follows unasked

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self.alias_waits = 0  # steps that finished at once, since somebody else holds memory of a parameter

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        """Why the strategy cannot serve the request, in a sentence with a remedy; None where it can."""
        return None

    @classmethod
    def suits(cls, request: Request) -> bool:
        """Whether ``update="auto"`` may choose the strategy."""
        return cls.refusal(request) is None

    @classmethod
    def usual_group_bytes(cls, request: Request, params: Sequence[torch.nn.Parameter], world: int, ratio: float) -> int:
        """The size of a fusion group of these parameters' gradients, which shrink by ``ratio``, where the user names
        none."""
        return default_group_bytes(sum(param.nbytes for param in params), ratio)

    # --- the layout ---

    def owners(self, layout: Layout) -> list[_C.Ownership]:
        """Who owns what of each bucket of a layout whose fusion groups are known: equal chunks."""
        return [_C.Ownership.even(flat.numel(), self.attached.world) for flat in layout.full]

    @abstractmethod
    def shard_of(self, full: torch.Tensor, owners: _C.Ownership) -> torch.Tensor:
        """Where this rank's chunk of the averaged gradients of a bucket goes, whose flat buffer is ``full``."""

    @abstractmethod
    def adopt(self, layout: Layout) -> Placeholders:
        """Takes a new layout, at the end of a backward pass; nothing is in flight, ``attached.layout`` is the former.

        Returns what is to stand in ``.grad`` after every backward pass.
        """

    def regroup(self) -> None:  # noqa: B027 - not every strategy needs it
        """The fusion groups of ``attached.layout`` have changed; nothing is in flight."""

    def parameters_changed(self, members: bool) -> None:  # noqa: B027 - not every strategy needs it
        """Parameters have another place in memory, or, ``members``, the optimizer has other ones or other groups;
        nothing is in flight, and there may be no layout yet.

        Raises:
            RuntimeError: training cannot go on so; nothing has been changed.
        """

    def before_forward(self, reduces: bool) -> None:  # noqa: B027 - not every strategy needs it
        """A forward pass begins, whose backward pass ``reduces`` gradients or keeps them local."""

    # --- the step ---

    def validate(self) -> None:  # noqa: B027 - not every strategy needs it
        """As :meth:`dear.compression.Binding.validate`, for strategies that serve compressors."""

    @abstractmethod
    def step(self, found: Found, optimizer: int) -> None:
        """One step of one of ``attached.users``, or its beginning, with the gradients ``found`` in ``.grad``. What it
        leaves for later makes the parameters pending, and :meth:`finish` does it."""

    def step_with_closure(self, closure: Callable[[], Any] | None) -> tuple[bool, Any]:
        """For strategies that let the optimizer call the closure: whether that was done, and the step's result."""
        return False, None

    def arrive(self, group: int) -> None:
        """Waits for what one of the barrier's groups needs to be finished."""
        index, optimizer = divmod(group, len(self.attached.users))
        self.attached.native.wait_gathered(index, optimizer)

    @abstractmethod
    def finish(self, group: int) -> None:
        """Once that is there, does what :meth:`step` left to do for the group, in whatever context. Its parameters
        stand then."""

    # --- gradients ---

    def put_back(self, standing: Standing) -> None:
        """At the end of a backward pass: what stood in ``.grad`` before it stands there again, with the average; where
        gradients are gathered."""
        raise NotImplementedError("Averages are in shards here.")

    @abstractmethod
    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        """As :meth:`dear.Engine.clip_grad_norm_`."""

    @abstractmethod
    def averaged_gradients(self) -> Grads:
        """The averaged gradients of the last backward pass, copied. Collective."""

    # --- the optimizer's state ---

    def full_state(self) -> AbstractContextManager[None]:
        """``optimizer.state`` is the full state inside, of every optimizer. Collective where it is held in parts."""
        return nullcontext()

    def show_full_state(self) -> None:  # noqa: B027 - not every strategy needs it
        """``optimizer.state`` is the full state until the next step, or :meth:`hide_full_state`. Collective where it is
        held in parts."""

    def hide_full_state(self) -> None:  # noqa: B027 - not every strategy needs it
        """Takes the full state back, with what was changed in it."""

    def check_export(self) -> None:  # noqa: B027 - not every strategy needs it
        """Raises RuntimeError where ``optimizer.state_dict()`` would give a part of the state only."""

    def state_was_loaded(self, optimizer: int) -> None:  # noqa: B027 - not every strategy needs it
        """One of the optimizers has loaded, or was given, another full state."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What the strategy adds to :meth:`dear.Engine.stats`: ``optimizer_state_bytes``, of this rank, at least."""

    @abstractmethod
    def release(self) -> None:
        """Puts the full state into the optimizer. Collective where it is held in parts; nothing is in flight."""
