"""``update="owned"``: each parameter belongs to one rank, which updates it whole, and updated parameters are gathered.

As with sharded updates the optimizer's state and work are divided by the world size, and the bytes on the wire are
those of an all-reduce. Only what a rank owns of a buffer follows the parameters' bounds (Note [Owners]). Groups that
are updated elementwise are cut as before, and fill up what whole parameters leave uneven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import optim

from dear import _C
from dear._assignment import Assignment, Unit, balanced_group_bytes
from dear._attached import Attached, Param
from dear._cuts import kept_apart
from dear._layout import Layout
from dear._optimizer import ELEMENTWISE
from dear._own_steps import has_own_step, refusal_of_own_step
from dear._sharded import ShardedUpdate
from dear._update import Request
from dear._whole import declares_whole, stays_whole, update_cost
from dear.preconditioning import Team

# Their step is not made of updates of one parameter each, whatever they declare.
_JOINT = (optim.LBFGS,)


class OwnedUpdate(ShardedUpdate):
    """See the module."""

    kind: ClassVar[str] = "owned"

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._assignment = Assignment(attached.world)

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        if request.compresses:
            return (
                'update="owned" gathers updated parameters, which a compressor would spoil: leave update out, or use '
                'update="replicated".'
            )
        joint = next((optimizer for optimizer in request.optimizers if isinstance(optimizer, _JOINT)), None)
        if joint is not None:
            return (
                f'update="owned" updates each parameter on its own, and {type(joint).__name__} updates all of them '
                'together: use update="replicated".'
            )
        own = next(filter(None, map(refusal_of_own_step, request.optimizers)), None)
        return own or request.refusal_of_aliases(cls.kind)

    @classmethod
    def suits(cls, request: Request) -> bool:
        return all(map(is_known, request.optimizers)) and super().suits(request)

    @classmethod
    def usual_group_bytes(cls, request: Request, params: Sequence[Param], world: int, ratio: float) -> int:
        requirements = _Requirements(request.optimizers, request.teams)
        return balanced_group_bytes([requirements.unit(param, 0, 0) for param in reversed(params)], world)

    def owners(self, layout: Layout) -> list[_C.Ownership]:
        requirements, preconditioning = _requirements(self.attached), self.attached.preconditioning
        self._assignment = Assignment(self.attached.world)
        for places in layout.groups:
            self._assignment.add_group([requirements.unit(place.param, place.bucket, place.start) for place in places])
        teams, ranks = preconditioning.teams, self._assignment.teams
        preconditioning.assigned({p: ranks[number] for number, team in enumerate(teams) for p in team.params})
        return [_C.Ownership(full.numel(), self._assignment.ranges(bucket)) for bucket, full in enumerate(layout.full)]

    @staticmethod
    def whole(attached: Attached) -> set[Param]:
        return _requirements(attached).whole

    def parameters_changed(self, members: bool) -> None:
        layout = self.attached.layout
        if members and layout is not None:
            whole = self.whole(self.attached)
            for place in layout.places:
                if place.param in whole and _owners_of(layout.owners[place.bucket], place.start, place.stop) > 1:
                    raise RuntimeError(
                        f"The parameter {self.attached.names[place.param]} came to a group that keeps its parameters "
                        "whole from one that does not, and is cut among ranks: call engine.detach() and attach again."
                    )
        super().parameters_changed(members)

    def stats(self) -> dict[str, Any]:
        costs = self._assignment.costs
        total = sum(costs)
        return super().stats() | {"update_balance": max(costs) * len(costs) / total if total else 1.0}


def is_known(optimizer: optim.Optimizer) -> bool:
    """Whether its step is known to update each parameter on its own."""
    return declares_whole(optimizer) or (type(optimizer) in ELEMENTWISE and not has_own_step(optimizer))


class _Requirements:
    """Which parameters of some optimizers stay whole and which together, and what their updates cost."""

    def __init__(self, optimizers: Sequence[optim.Optimizer], teams: Sequence[Team]) -> None:
        self.whole: set[Param] = set()
        self._costs: dict[Param, Callable[[Param], float]] = {}
        for optimizer in optimizers:
            cost = update_cost(optimizer)
            for group in optimizer.param_groups:
                self._costs.update(dict.fromkeys(group["params"], cost))
                if stays_whole(optimizer, group):
                    self.whole.update(group["params"])
        self._teams = {param: number for number, team in enumerate(teams) for param in team.params}
        self._shared = {team.params[0]: team.cost for team in teams}  # of a team, by its first parameter
        self.whole.update(kept_apart(optimizers))
        self._own = set(self.whole)
        self.whole.update(self._teams)

    def unit(self, param: Param, bucket: int, start: int) -> Unit:
        """A parameter as it is shared out. One that no optimizer has stays whole: it may come to any group."""
        whole = param in self.whole or param not in self._costs
        cost = self._costs[param](param) if param in self._own else 0.0
        cost += self._shared.get(param, 0.0)
        stop = start + param.numel()
        return Unit(bucket, start, stop, param.element_size(), cost, whole, self._teams.get(param))


def _requirements(attached: Attached) -> _Requirements:
    return _Requirements([user.optimizer for user in attached.users], attached.preconditioning.teams)


def _owners_of(owners: _C.Ownership, start: int, stop: int) -> int:
    ranks = range(owners.world)
    return sum(any(begin < stop and start < end for begin, end in owners.ranges(rank)) for rank in ranks)
