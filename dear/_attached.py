"""What the parts of an engine share: the model, its parameters, the native scheduler, and the layout as it stands."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C, _grads
from dear._changes import Changes
from dear._grads import Found, Grads, Watcher
from dear._layout import Layout
from dear._optimizer import UserOptimizer
from dear._pending import Barrier
from dear._placeholders import Placeholders
from dear._standing import Arrivals
from dear.compression import Binding
from dear.preconditioning import Binding as PreconditionerBinding
from dear.preconditioning import Unpreconditioned

Param = torch.nn.Parameter
Owner = TypeVar("Owner")

_NONE: set[Param] = set()


class AnyScheduler(Protocol):
    """What is asked of a scheduler whether it is the native one or DDP is left alone."""

    def passes(self) -> int: ...

    def awaited_bucket(self) -> int | None: ...

    def has_gradients(self) -> bool: ...

    def gradients_used(self) -> None: ...

    def synchronize(self) -> None: ...

    def take_wait_times(self) -> tuple[int, int]: ...

    def bytes_sent(self) -> int: ...

    def start_trace(self) -> None: ...

    def stop_trace(self) -> list[_C.TraceEvent]: ...

    def abort(self, reason: str, /) -> None: ...

    def release(self) -> None: ...


@dataclass(eq=False)
class Attached:
    """A model and its optimizer under the schedule. Everybody reads it; each field says who writes it."""

    model: DDP
    users: list[UserOptimizer]  # one, or several that step on their own
    group: dist.ProcessGroup
    device: torch.device
    params: list[Param]  # those that DDP's reducer knows, in the model's order
    names: dict[Param, str]  # of all parameters of the model
    update: str  # which strategy, by the name that the setting has for it
    scheduler: AnyScheduler
    gather_lane: _C.Lane
    barrier: Barrier
    compression: Binding
    preconditioning: PreconditionerBinding = field(default_factory=Unpreconditioned)

    layout: Layout | None = None  # the schedule: None before the first backward pass
    order: list[int] = field(default_factory=list)  # the schedule: fusion groups as the forward pass wants them
    placeholders: Placeholders = field(default_factory=list)  # the schedule: what backward leaves in .grad
    unused: set[Param] = field(default_factory=set)  # the schedule: those no rank used in the last backward pass
    unreduced: _C.Unreduced | None = None  # the schedule: where gradients stay in shards, which are local

    changes: Changes = field(default_factory=Changes)  # the update: what was done to gradients in shards

    # The schedule: how many backward passes had been reduced before the last forward pass whose gradients are to be,
    # and before the last one under no_sync().
    passes_before_forward: int | None = None
    forward_passes: int = 0  # since then, of those
    passes_before_local: int | None = None

    arrivals: Arrivals = field(default_factory=Arrivals)  # of gradients, in the next backward pass

    _members: defaultdict[int, Watcher] = field(default_factory=lambda: defaultdict(Watcher))  # by optimizer
    _everyone: Watcher = field(default_factory=Watcher)

    @property
    def user(self) -> UserOptimizer:
        """The optimizer, where there is one."""
        return self.users[0]

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def world(self) -> int:
        return self.group.size()

    @property
    def native(self) -> _C.Scheduler:
        """The scheduler, for what runs under a schedule of our own."""
        assert isinstance(self.scheduler, _C.Scheduler)
        return self.scheduler

    @property
    def known_layout(self) -> Layout:
        """The layout, after the first backward pass."""
        assert self.layout is not None
        return self.layout

    def optimizer_of(self) -> dict[Param, int]:
        """Which of the optimizers has which parameter."""
        return {param: number for number, user in enumerate(self.users) for param in user.params}

    def pending_groups(self, optimizer: int | None = None) -> list[int]:
        """The barrier's groups in the order of the forward pass, of one optimizer or of all: each fusion group has one
        for each optimizer, since these step one after another."""
        count = len(self.users)
        numbers = range(count) if optimizer is None else (optimizer,)
        return [group * count + number for group in self.order for number in numbers]

    def check_reduced(self, optimizer: int | None = None) -> None:
        """Refuses gradients of one optimizer's parameters, or of all optimizers', that are still local: of passes under
        no_sync() that no other pass has reduced since, or of one that DDP has not ended, since it missed a parameter.

        Raises:
            RuntimeError: names a parameter that has such a gradient, or that was missed.
        """
        awaited = self.scheduler.awaited_bucket()
        if self.scheduler.has_gradients() and awaited is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            users = self.users if optimizer is None else [self.users[optimizer]]
            having = [param for user in users for param in user.params if param.grad is not None]
            missed = [param for param in self.params if param.grad is None]
        if awaited is not None:  # of other buckets there are averages, and this one's are the last pass's, or none
            bucket = self.params if self.layout is None else [each.param for each in self.layout.in_bucket(awaited)]
            lacking = set(missed)
            raise _grads.missed(self.names[next((param for param in bucket if param in lacking), bucket[0])])
        if having and self.passes_before_local == self.scheduler.passes():
            raise _grads.unreduced(self.names[having[0]])
        reduced = self.passes_before_forward is not None and self.passes_before_forward < self.scheduler.passes()
        # Replicated updates do what plain DDP does. Others would mix what is local to the ranks.
        if reduced and self.forward_passes > 1 and (local := self._unreduced(having)) is not None:
            raise _grads.second(self.names[local])
        if having and missed and self.passes_before_forward == self.scheduler.passes():
            raise _grads.missed(self.names[missed[0]])

    def check_own(self, own: Grads) -> None:
        """Refuses gradients in ``.grad`` that a backward pass has left and nobody has reduced: of what is local to it,
        each rank would take a part.

        Raises:
            RuntimeError: names a parameter that has such a gradient.
        """
        local = self._unreduced(own)
        if local is not None:
            under_no_sync = self.passes_before_local == self.scheduler.passes()
            raise (_grads.unreduced if under_no_sync else _grads.bypassed)(self.names[local])

    def _unreduced(self, among: Collection[Param]) -> Param | None:
        """One of these parameters in whose ``.grad`` a backward pass has left what nobody has reduced."""
        if not among or self.unreduced is None:
            return None
        wanted = set(among)
        has = self.unreduced.has
        return next((param for number, param in enumerate(self.params) if param in wanted and has(number)), None)

    def look_at_grads(self, optimizer: int | None = None) -> Found:
        """What stands in the ``.grad`` of one optimizer's parameters, or of all optimizers', that some rank has used,
        after a layout."""
        found = Found()
        for number in range(len(self.users)) if optimizer is None else (optimizer,):
            found.add(self._members[number].look(self.placeholders, self.users[number].params, self.unused))
        return found

    def look_at_all_grads(self) -> Found:
        """The same for every parameter that DDP reduces."""
        return self._everyone.look(self.placeholders, self.params, _NONE)

    def synchronize(self) -> None:
        """Waits until nothing is in flight and every parameter is finished.

        Raises:
            RuntimeError: a peer has died or stalled; names the rank, the phase and the fusion group.
        """
        self.scheduler.synchronize()
        self.barrier.settle(self.pending_groups())


def weakly(owner: Owner, action: Callable[[Owner], None]) -> Callable[[], None]:
    """``action(owner)`` as long as there is an owner: for callbacks that must not keep it alive."""
    held = weakref.ref(owner)

    def act() -> None:
        alive = held()
        if alive is not None:
            action(alive)

    return act
