"""The optimizers' state while each rank has a part of it: by segment, shown in full, saved and loaded in parts."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dear import _ddp, _state
from dear._attached import Attached, Param, weakly
from dear._context import StepContext, ordinary
from dear._cuts import kept_apart
from dear._layout import Layout, Segment, cut_segments
from dear._state_parts import LoadedState, StateParts
from dear._state_views import ShardedState
from dear._update import bytes_of

Whole = Callable[[Attached], set[Param]]  # the parameters that must not be cut
ByOptimizer = list[_state.FullState]


class SegmentStates:
    """What this rank's part of each optimizer works on: segments, and their state.

    Before there is a layout every rank has all of the state in ``optimizer.state``. After that ``optimizer.state``
    refuses to be read, except while the full state is shown.
    """

    def __init__(self, attached: Attached, whole: Whole) -> None:
        self.segments: list[Segment] = []
        self.by_group: list[list[Segment]] = []  # by fusion group
        self.values: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)  # by segment
        self.shows_full = False  # in optimizer.state
        self._attached, self._whole = attached, whole
        # By optimizer, as it was cut: its parameters; the state of those that DDP does not reduce; and that of
        # parameters that no group of it lists, which torch keeps for the day when one does again. Both in full.
        self._members: list[set[Param]] = [set() for _ in attached.users]
        self._others: ByOptimizer = [{} for _ in attached.users]
        self._idle: ByOptimizer = [{} for _ in attached.users]
        self._views: list[Any] = [None] * len(attached.users)  # in optimizer.state, while it refuses
        self._loaded: LoadedState | None = None  # before there was a layout

    # --- segments ---

    def take_full(self, layout: Layout) -> ByOptimizer:
        """The state that a new layout begins with, as far as this rank needs it. Collective."""
        full = self.full() if self._loaded is None else self._spread(self._loaded, layout)
        self._loaded = None
        return full

    def adopt(self, layout: Layout, full: ByOptimizer) -> None:
        """Cuts a new layout, with the state that :meth:`take_full` gave for it."""
        self.segments = []
        self.values.clear()
        self.cut_all(layout, full)

    def cut_all(self, layout: Layout, full: ByOptimizer) -> None:
        """As :meth:`cut`, for every optimizer."""
        for number, state in enumerate(full):
            self.cut(layout, state, number)

    def cut(self, layout: Layout, full: _state.FullState, number: int) -> None:
        """Makes segments of what this rank owns of an optimizer's parameters, and takes their part of its full
        state."""
        attached = self._attached
        # Where parameters may go unused, each is updated on its own.
        merge = not _ddp.tracks_unused(attached.model)
        whole = self._whole(attached)
        apart = kept_apart(user.optimizer for user in attached.users)
        here = {place.param for place in layout.places}
        optimizer = attached.users[number].optimizer
        _forget(self, number)
        self.segments = [segment for segment in self.segments if segment.optimizer != number]
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        segments = cut_segments(
            layout, attached.rank, number, group_of, whole,
            lambda param: _state.kind(full.get(param, {})) if merge and param not in apart else id(param),
        )  # fmt: skip
        self.segments += segments
        self.values.update(_state.scatter(full, segments))
        self._others[number] = {param: full[param] for param in group_of if param in full and param not in here}
        self._members[number] = set(group_of)
        self._idle[number] = {param: state for param, state in full.items() if param not in group_of}
        view = ShardedState(weakly(self, functools.partial(_forget, number=number)))
        optimizer.state = self._views[number] = view

    def regroup(self) -> None:
        """Sorts the segments by the fusion groups of ``attached.layout``."""
        layout = self._attached.known_layout
        self.by_group = [[] for _ in layout.groups]
        for segment in self.segments:
            self.by_group[layout.group_of_bucket[segment.bucket]].append(segment)

    # --- in full ---

    def full(self) -> ByOptimizer:
        """The full state, on every rank. Collective where it is in parts."""
        attached = self._attached
        if attached.layout is None:
            self.take_loaded()
            return [dict(user.optimizer.state) for user in attached.users]
        full = _state.gather(self.values, self.segments, attached.layout, attached.gather_lane)
        return [
            others | {param: state for param, state in full.items() if param in members} | idle
            for members, others, idle in zip(self._members, self._others, self._idle, strict=True)
        ]

    def take_loaded(self) -> None:
        """What was loaded before there was a layout becomes every rank's full state. Collective where there is any."""
        if self._loaded is not None:
            loaded, self._loaded = self._placed(self._loaded.whole(self._attached.gather_lane)), None
            for user in self._attached.users:
                user.optimizer.state.update({param: loaded[param] for param in user.params if param in loaded})

    @contextmanager
    def exported(self) -> Iterator[None]:
        """``optimizer.state`` is the full state inside, to be read."""
        if self.shows_full:
            yield
            return
        users = self._attached.users
        if self._attached.layout is None:
            self.take_loaded()
        before = [user.optimizer.state for user in users]
        if self._attached.layout is not None:
            self.show_full()
        self.shows_full = True
        try:
            yield
        finally:
            for user, state in zip(users, before, strict=True):
                user.optimizer.state = state
            self.shows_full = False

    def show_full(self) -> None:
        """``optimizer.state`` is the full state until :meth:`hide_full`."""
        if self.shows_full:
            return
        for user, state in zip(self._attached.users, self.full(), strict=True):
            user.optimizer.state = defaultdict(dict, state)
        self.shows_full = True

    def hide_full(self) -> None:
        """Takes the full state back, which may have been changed."""
        if self.shows_full:
            self.shows_full = False
            for number in range(len(self._attached.users)):
                self.was_loaded(number)

    def take_back(self, optimizer: int) -> None:
        """Before a step: what the user was shown, or has put in its place, is cut again."""
        self.hide_full()
        if self._attached.users[optimizer].optimizer.state is not self._views[optimizer]:
            self.was_loaded(optimizer)

    def was_loaded(self, optimizer: int) -> None:
        """One of the optimizers has loaded, or was given, another full state."""
        layout = self._attached.layout
        if self._loaded is not None:
            self._loaded.forget(self._attached.users[optimizer].params)
        if layout is not None and not self.shows_full:
            with ordinary(StepContext(self._attached.device)):
                self.cut(layout, dict(self._attached.users[optimizer].optimizer.state), optimizer)
            self.regroup()

    def check_export(self) -> None:
        """As :meth:`dear._update.Update.check_export`."""
        if not self.shows_full:
            raise RuntimeError(
                "The optimizer's state is held in shards, so optimizer.state_dict() has only a part: call "
                "engine.state_dict() on every rank and save its result, or enter engine.full_state() on every rank."
            )

    # --- in parts ---

    def parts(self) -> StateParts | None:
        """This rank's; None while every rank has all of it in ``optimizer.state``."""
        if self._attached.layout is None:
            return None if self._loaded is None else self._loaded.parts
        for user, idle in zip(self._attached.users, self._idle, strict=True):
            user.check_listed(idle)
        others = {param: state for others in self._others for param, state in others.items()}
        return StateParts.of(self.values, self.segments, others)

    def load_parts(self, loaded: LoadedState) -> None:
        """Takes this rank's parts of a state. Collective."""
        layout = self._attached.layout
        if layout is None:
            self._loaded = loaded
            return
        with ordinary(StepContext(self._attached.device)):
            self.cut_all(layout, self._spread(loaded, layout))
        self.regroup()

    def _spread(self, loaded: LoadedState, layout: Layout) -> ByOptimizer:
        full = self._placed(loaded.spread(layout, self._attached.gather_lane))
        return [{param: full[param] for param in user.params if param in full} for user in self._attached.users]

    def _placed(self, full: _state.FullState) -> _state.FullState:
        for group in (group for user in self._attached.users for group in user.optimizer.param_groups):
            known = [param for param in group["params"] if param in full]
            full.update({param: _state.placed(param, full[param], group) for param in known})
        return full

    def nbytes(self) -> int:
        """Of this rank's part, or of all, before there is a layout."""
        users = self._attached.users
        states = [self.values] if self._attached.layout is not None else [user.optimizer.state for user in users]
        return bytes_of(values for state in states for values in state.values())

    def release(self) -> None:
        """Leaves the full state in ``optimizer.state``."""
        if self._attached.layout is None:
            self.take_loaded()
        else:
            self.shows_full = False
            self.show_full()


def _forget(states: SegmentStates, number: int) -> None:
    """Drops an optimizer's state: this rank's part of it, and that of parameters that DDP does not reduce, or that no
    group lists."""
    states._others[number], states._idle[number] = {}, {}
    for segment in states.segments:
        if segment.optimizer == number:
            states.values.pop(segment.tensor, None)
