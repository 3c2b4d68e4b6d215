"""Who chooses the setting while training goes on: what ``compressor="auto"`` needs, and nothing of how it decides.

A chooser is found by an entry point, so that this package knows no planner: ``dear.attach`` hands it a
:class:`Steering`, by which it may look on and change the setting at step boundaries.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C, _ddp
from dear._assembly import STRATEGIES, Ground, Setting
from dear._context import StepContext, ordinary
from dear._findings import AUTO
from dear._look_again import overlapping
from dear._objects import all_gather_object, broadcast_object
from dear._plain import PlainUpdate
from dear._replicas import check_equal
from dear._update import Request
from dear.engine import Engine

__all__ = ["Chooser", "Setting", "Steering", "auto", "is_chooser"]

GROUP, NAME = "dear.chooser", "auto"
PARTED = "load the same checkpoint on every rank, and look for code that changes parameters on some ranks only"
#: Where no entry point is installed, as in a checkout: the planner's own module, under either name of its package.
FALLBACK = ("dear_planner.auto", "planner.auto")


class Chooser(Protocol):
    """What :func:`dear.attach` takes as ``compressor`` in the place of a compressor. One serves one engine."""

    def check_new(self, model: DDP, caller: str) -> dict[str, Any]:
        """Refuses what it cannot serve; returns what must be equal on every rank."""

    def first(self, steering: Steering) -> Setting | None:
        """The setting to begin with; None for ``attach``'s own."""

    def begin(self, steering: Steering) -> None:
        """The engine stands, in the first setting."""

    def step_began(self) -> None:
        """A step boundary: called once between two steps, as the first forward pass of a step begins. Collective."""

    @property
    def plan(self) -> dict[str, Any] | None:
        """What was chosen, as JSON can hold it; None as long as nothing is."""

    def state_dict(self) -> dict[str, Any] | None:
        """What was chosen, to be saved with the engine's state; None while it chooses: see :mod:`dear._findings`."""

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Goes on with what :meth:`state_dict` gave, if it can be followed here; says whether it is. Collective."""

    def release(self) -> None:
        """The engine is detached: takes everything off the model."""


def auto(**options: Any) -> Chooser:
    """A new chooser of the installed planner.

    Raises:
        ValueError: there is none.
    """
    found = next(iter(metadata.entry_points(group=GROUP, name=NAME)), None)
    if found is not None:
        return found.load()(**options)  # type: ignore[no-any-return]
    for name in FALLBACK:
        if importlib.util.find_spec(name.partition(".")[0]) is not None and importlib.util.find_spec(name) is not None:
            return importlib.import_module(name).Auto(**options)  # type: ignore[no-any-return]
    raise ValueError('compressor="auto" needs the planner beside dear: install dear-torch[auto], or run in a checkout.')


def is_chooser(thing: Any) -> bool:
    return hasattr(thing, "step_began") and not isinstance(thing, type)


class Steering:
    """An engine as its chooser sees it. Every method that is collective must be called by all ranks alike."""

    def __init__(self, ground: Ground, setting: Setting, chooser: Chooser, *, update: str, tunes_cap: bool) -> None:
        """``setting``: that of ``attach``, of which the chooser may begin with another one. ``update``: which update
        the user has named, or "auto". ``tunes_cap``: whether the user leaves the size of fusion groups open."""
        self.ground, self.setting, self.tunes_cap = ground, setting, tunes_cap
        self._chooser, self._update = chooser, update
        self._engine: Engine | None = None
        self._seen = 0  # steps, at the last boundary
        self.setting = chooser.first(self) or setting

    @property
    def engine(self) -> Engine:
        """After ``begin``."""
        assert self._engine is not None
        return self._engine

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return tuple(user.optimizer for user in self.ground.users)

    def begin(self, engine: Engine) -> None:
        """Puts the chooser to work."""
        self._engine, engine._steering = engine, self
        self._chooser.begin(self)
        engine._findings.add(AUTO, self)

    @property
    def steps(self) -> int:
        """Of the engine, so far."""
        return self.engine._counters.totals.steps

    @property
    def plan(self) -> dict[str, Any] | None:
        """See :class:`Chooser`."""
        return self._chooser.plan

    def state_dict(self) -> dict[str, Any] | None:
        """See :class:`Chooser`."""
        return self._chooser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """See :class:`Chooser`. Collective."""
        if self.engine._attached.scheduler.has_gradients():
            self.engine._schedule.unclaimed()
        with ordinary(StepContext.here(self.ground.device)):
            return self._chooser.load_state_dict(state)

    def release(self) -> None:
        """The engine is detached."""
        self._chooser.release()
        self.ground.let_go_of_lanes(None)

    def before_forward(self) -> None:
        """Only the first forward pass after a step is a boundary: gradients may be local after any other."""
        if self.steps == self._seen or not torch.is_grad_enabled():
            return
        model = self.ground.model
        if self.engine._attached.scheduler.has_gradients():
            return
        if model.static_graph and not model.require_backward_grad_sync:  # which a new reducer could not learn
            return
        self._seen = self.steps
        with ordinary(StepContext.here(self.ground.device)):
            self._chooser.step_began()

    # --- what may be chosen ---

    def updates(self, compresses: bool) -> list[str]:
        """The update strategies that can serve the optimizer, ``"ddp"`` among them unless the user named one. A
        preconditioner stays where it is."""
        if self.ground.preconditioner is not None:
            return [] if compresses else [self.setting.update]
        request = self._request(compresses)
        if self._update != "auto":
            named = STRATEGIES[self._update]
            return [] if named.refusal(request) else [self._update]
        found = [name for name, kind in STRATEGIES.items() if kind.refusal(request) is None]
        return found if compresses else [*found, PlainUpdate.kind]

    def _request(self, compresses: bool) -> Request:
        model = self.ground.model
        return Request(self.optimizers, compresses, overlapping(_ddp.parameter_names(model)))

    def lanes(self, all_to_all: bool) -> dict[str, _C.Lane]:
        """What exchanges move in, by phase, to be measured: of two levels where the engine's are. Collective."""
        return self.ground.lanes_by_phase(all_to_all)

    # --- what it may do, at a step boundary ---

    def switch(self, setting: Setting) -> None:
        """Trains with another setting from now on. Optimizer state and parameters stay, bit for bit; a
        compressor's error feedback ends with it. Collective.

        Raises:
            ValueError: a compressor cannot serve this model, or replicas that each rank has updated whole differ;
                nothing has been changed.
        """
        now, engine = self.setting, self.engine
        if setting == now:
            return
        if setting.compressor is not None and setting.compressor is not now.compressor:
            setting.compressor.check_new(self.ground.model, "dear.attach()")
        if now.compressor is None and (setting.update, setting.compressor) == (now.update, None):
            engine.bucket_cap_mb = setting.bucket_cap_mb
        else:
            if _in_parts(setting) and not _in_parts(now):
                engine.synchronize()
                with ordinary(StepContext.here(self.ground.device)), torch.no_grad():
                    check_equal(self.ground.model, self.optimizers, PARTED)
            engine._replace(lambda: self.ground.assemble(setting))
        self.setting = setting

    def settled(self) -> None:
        """The setting is to stay: what it does not use is given back. Collective."""
        self.ground.let_go_of_lanes(self.setting)

    def tell(self, value: Any, label: str) -> Any:
        """What rank 0 passes. Collective."""
        return broadcast_object(self.engine._attached.gather_lane, value, label, self.ground.device)

    def everyones(self, value: Any, label: str) -> list[Any]:
        """What every rank passes, by rank. Collective."""
        return all_gather_object(self.engine._attached.gather_lane, value, label, self.ground.device)


def _in_parts(setting: Setting) -> bool:
    """Whether each rank updates a part, and what it has made of that is handed to all."""
    return setting.update in STRATEGIES and not STRATEGIES[setting.update].gathers_gradients
