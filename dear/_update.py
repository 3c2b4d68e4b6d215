"""Who updates what between the two halves of an exchange: the interface of the strategies, and the choice of one.

Note [Update strategies]
A strategy owns everything that depends on who updates what: what the flat buffers hold, what ``.grad`` shows, the
optimizer's step, what a pending parameter still needs, clipping, and the optimizer's state in and out. The schedule
and the engine know no strategy by name: another one is a file with a subclass of :class:`Update`, and a line in
:mod:`dear.attaching`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dear._attached import Attached
from dear._grads import Found, Grads
from dear._layout import Layout
from dear._placeholders import Placeholders


@dataclass(frozen=True)
class Request:
    """What a strategy is asked to serve."""

    optimizer: type
    compresses: bool  # gradients are compressed
    shared: tuple[str, str] | None  # the names of two parameters that share memory


class Update(ABC):
    """One strategy at work for one engine. Called from the training thread, at a step boundary unless said."""

    kind: ClassVar[str]  #: what ``dear.attach(update=...)`` calls it
    gathers_gradients: ClassVar[bool]  #: the all-gather is of averaged gradients, and follows unasked

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        """Why the strategy cannot serve the request, in a sentence with a remedy; None where it can."""
        return None

    # --- the layout ---

    @abstractmethod
    def shard_of(self, full: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Where the averaged gradients ``[begin, end)`` of a bucket go, whose flat buffer is ``full``."""

    @abstractmethod
    def adopt(self, layout: Layout) -> Placeholders:
        """Takes a new layout, at the end of a backward pass; nothing is in flight, ``attached.layout`` is the former.

        Returns what is to stand in ``.grad`` after every backward pass.
        """

    def regroup(self) -> None:  # noqa: B027 - not every strategy needs it
        """The fusion groups of ``attached.layout`` have changed; nothing is in flight."""

    def parameters_changed(self, members: bool) -> None:  # noqa: B027 - not every strategy needs it
        """Parameters have another place in memory, or, ``members``, the optimizer has other ones or other groups;
        nothing is in flight."""

    def before_forward(self, reduces: bool) -> None:  # noqa: B027 - not every strategy needs it
        """A forward pass begins, whose backward pass ``reduces`` gradients or keeps them local."""

    def zeroed(self) -> None:  # noqa: B027 - not every strategy needs it
        """The optimizer has set its gradients to None or to zero."""

    # --- the step ---

    @abstractmethod
    def step(self, found: Found) -> None:
        """One step of the optimizer, or its beginning, with the gradients ``found`` in ``.grad``. What it leaves for
        later makes the parameters pending, and :meth:`finish` does it."""

    def step_with_closure(self, closure: Callable[[], Any] | None) -> tuple[bool, Any]:
        """For strategies that let the optimizer call the closure: whether that was done, and the step's result."""
        return False, None

    @abstractmethod
    def finish(self, group: int) -> None:
        """Does what :meth:`step` left to do for a fusion group, in whatever context; its parameters stand then."""

    # --- gradients ---

    @abstractmethod
    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        """As :meth:`dear.Engine.clip_grad_norm_`."""

    @abstractmethod
    def averaged_gradients(self) -> Grads:
        """The averaged gradients of the last backward pass, copied. Collective."""

    # --- the optimizer's state ---

    @contextmanager
    def full_state(self) -> Iterator[None]:
        """``optimizer.state`` is the full state inside. Collective where it is held in parts."""
        yield

    def check_export(self) -> None:  # noqa: B027 - not every strategy needs it
        """Raises RuntimeError where ``optimizer.state_dict()`` would give a part of the state only."""

    def state_was_loaded(self) -> None:  # noqa: B027 - not every strategy needs it
        """The optimizer has loaded, or was given, another full state."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""

    @abstractmethod
    def release(self) -> None:
        """Puts the full state into the optimizer. Collective where it is held in parts; nothing is in flight."""
