"""``update="sharded"``: each rank updates its shard of the parameters, and the updated parameters are gathered.

The optimizer's state and work are divided by the world size (ZeRO, stage 1); the bytes on the wire are the same.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from dear import _C, _ddp, _grads, _state
from dear._attached import Attached, Param, weakly
from dear._changed_gradients import ChangedGradients
from dear._context import StepContext, ordinary
from dear._flat_parameters import FlatParameters
from dear._grads import Found, Grads
from dear._layout import Layout, Segment, cut_segments
from dear._optimizer import ELEMENTWISE, Groups
from dear._placeholders import Placeholders, local_grad
from dear._preconditioned import Preconditioning
from dear._sharded_gradients import ShardedGradients
from dear._state_parts import LoadedState, StateParts
from dear._state_views import ShardedState
from dear._update import Request, Update, bytes_of


class ShardedUpdate(Update):
    """See the module. Before the first backward pass, state and parameters are as the user made them."""

    kind: ClassVar[str] = "sharded"
    gathers_gradients: ClassVar[bool] = False

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._flat: FlatParameters | None = None
        self._segments: list[Segment] = []
        self._by_group: list[list[Segment]] = []  # by fusion group
        self._state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)  # by segment
        self._others: _state.FullState = {}  # of parameters that DDP does not reduce
        self._shown: list[Any] = [None] * len(attached.users)  # in optimizer.state
        self._exporting = False
        self._loaded: LoadedState | None = None  # before there was a layout
        self._gradients = ShardedGradients(attached)
        self._changes = ChangedGradients(attached, self._gradients)
        self._preconditioning = Preconditioning(attached, self._gradients)

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        if request.compresses:
            return (
                'update="sharded" gathers updated parameters, which a compressor would spoil: leave update out, or use '
                'update="replicated".'
            )
        for optimizer in request.optimizers:
            if type(optimizer) not in ELEMENTWISE:
                return (
                    f'update="sharded" cuts parameters anywhere, and {type(optimizer).__name__} is not known to update '
                    'each element on its own: use update="replicated", or update="owned" if it updates each parameter '
                    "on its own."
                )
        return request.refusal_of_aliases(cls.kind)

    # --- the layout ---

    def shard_of(self, full: torch.Tensor, owners: _C.Ownership) -> torch.Tensor:
        return full.new_empty(owners.size(self.attached.rank))

    def whole(self) -> set[Param]:
        """The parameters that must not be cut: here none."""
        return set()

    def adopt(self, layout: Layout) -> Placeholders:
        former = self._full_state() if self._loaded is None else self._loaded.spread(layout, self.attached.gather_lane)
        self._loaded = None
        self._flat = FlatParameters(layout)
        self._segments = []
        self._state.clear()
        self._cut(layout, former, range(len(self.attached.users)))
        gradients, follow, answer = self._gradients, self._gradients.before_add(), self._gradients.answering()
        flats = [bucket.buffer.view(-1) for bucket in layout.buckets]
        return [
            (
                place.param,
                local_grad(place.view(flats[place.bucket]), index, gradients.before_zero(index), follow, answer),
            )
            for index, place in enumerate(layout.places)
        ]

    def _cut(self, layout: Layout, full: _state.FullState, numbers: Iterable[int]) -> None:
        """Makes segments of what this rank owns of these optimizers' parameters, and takes their part of the full
        state."""
        attached = self.attached
        # Where parameters may go unused, each is updated on its own.
        merge = not _ddp.tracks_unused(attached.model)
        whole = self.whole()
        here = {place.param for place in layout.places}
        for number in numbers:
            optimizer = attached.users[number].optimizer
            _forget(self, number)
            self._segments = [segment for segment in self._segments if segment.optimizer != number]
            group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            segments = cut_segments(
                layout, attached.rank, number, group_of, whole,
                lambda param: _state.kind(full.get(param, {})) if merge else id(param),
            )  # fmt: skip
            self._segments += segments
            self._state.update(_state.scatter(full, segments))
            others = {param: full[param] for param in group_of if param in full and param not in here}
            self._others = {p: state for p, state in self._others.items() if p not in group_of} | others
            shown = ShardedState(weakly(self, functools.partial(_forget, number=number)))
            optimizer.state = self._shown[number] = shown

    def regroup(self) -> None:
        layout = self.attached.known_layout
        self._by_group = [[] for _ in layout.groups]
        for segment in self._segments:
            self._by_group[layout.group_of_bucket[segment.bucket]].append(segment)

    def parameters_changed(self, members: bool) -> None:
        attached, layout = self.attached, self.attached.layout
        if layout is None:
            return
        assert self._flat is not None
        moved = self._flat.moved()
        if moved:
            self._flat.move_back(moved)
            for segment in self._segments:
                segment.tensor.data = segment.view(layout.full[segment.bucket])
        if members:
            self._cut(layout, self._full_state(), range(len(attached.users)))
        if moved or members:
            attached.scheduler.replace_buffers(layout.buffers(attached.optimizer_of(), len(attached.users)))

    # --- the step ---

    def step(self, found: Found, optimizer: int) -> None:
        attached = self.attached
        user = attached.users[optimizer]
        if attached.layout is None or (self._exporting and not found.reduced):
            user.run_all(None)
            return
        self.hide_full_state()
        if user.optimizer.state is not self._shown[optimizer]:  # the user's own
            self.state_was_loaded(optimizer)
        if found.missing:
            raise _grads.dropped(attached.names[found.missing[0]])
        if attached.scheduler.has_gradients():
            attached.scheduler.check_untouched()
        pending = attached.pending_groups(optimizer)
        attached.barrier.settle(pending)  # the last step's, if this one follows without a backward pass
        assert self._flat is not None
        self._flat.copy_in()
        self._take(found.own)
        self._preconditioning.run(self._by_group)
        self._update_as_reduced(optimizer)
        attached.barrier.close(pending)
        if self._flat.has_aliases:
            self.alias_waits += 1
            attached.synchronize()

    def _update_as_reduced(self, optimizer: int) -> None:
        """Each fusion group is updated once its gradients have been reduced, and gathered in the forward's order."""
        attached, scheduler = self.attached, self.attached.scheduler
        updated: set[int] = set()
        if attached.users[optimizer].is_first_update:
            for index in attached.order:
                scheduler.wait_reduced(index)
            self._run(optimizer, attached.order, "all fusion groups")
            updated.update(attached.order)
            attached.users[optimizer].is_first_update = False

        def update(group: int) -> None:
            scheduler.wait_reduced(group)
            self._run(optimizer, [group], f"fusion group {group}")
            updated.add(group)

        for index in attached.order:
            # While the next group to be gathered is still being reduced, update one that is not.
            while index not in updated and not scheduler.reduced(index):
                ready = next((i for i in attached.order if i not in updated and scheduler.reduced(i)), None)
                if ready is None:
                    break
                update(ready)
            if index not in updated:
                update(index)
            scheduler.submit_gather(index, optimizer)
        self._changes.conclude(optimizer, self._segments)

    def _take(self, own: Grads) -> None:
        """Takes this rank's part of gradients that the user has put into ``.grad``, in place of the averages."""
        if not own:
            return
        self.attached.scheduler.synchronize()
        for segment in self._segments:
            for place in segment.places:
                if place.param in own:
                    assert segment.tensor.grad is not None
                    segment.slot(place, segment.tensor.grad).copy_(segment.part(place, own[place.param]))
        for param, placeholder in self.attached.placeholders:
            if param in own:
                param.grad = placeholder

    def _run(self, optimizer: int, groups: Iterable[int], name: str) -> None:
        """One update of an optimizer's segments in these fusion groups, with the hyper-parameters as they stand."""
        start = _C.now_ns()
        user = self.attached.users[optimizer]
        segments = [
            segment
            for index in groups
            for segment in self._by_group[index]
            if segment.optimizer == optimizer and segment.is_used(self.attached.unused)
        ]
        work: Groups = []
        for index, group in enumerate(user.optimizer.param_groups):
            tensors = [segment.tensor for segment in segments if segment.group == index]
            if tensors:
                work.append({**group, "params": tensors})
        if work:
            with self._changes.watch(segments):
                user.run(work, self._state)
        self.attached.scheduler.trace("update", name, start, _C.now_ns())

    def finish(self, group: int) -> None:
        attached = self.attached
        index, optimizer = divmod(group, len(attached.users))
        attached.scheduler.wait_gathered(index, optimizer)
        assert self._flat is not None
        self._flat.copy_out(attached.known_layout.pending[group])

    # --- gradients ---

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        attached = self.attached
        attached.scheduler.synchronize()
        found = attached.look_at_grads()
        self._take(found.own)
        used = [] if found.nothing else [segment for segment in self._segments if segment.is_used(attached.unused)]
        grads = [segment.tensor.grad for segment in used if segment.tensor.grad is not None]
        each = torch._foreach_norm(grads, norm_type) if grads else [torch.zeros((), device=attached.device)]
        # One type on every rank, whichever gradients are there.
        known = attached.layout.shard if attached.layout is not None else []
        wide = torch.float64 if any(shard.dtype == torch.float64 for shard in known) else torch.float32
        own = torch.stack([norm.to(wide) for norm in each]).norm(norm_type)
        total = torch.linalg.vector_norm(self._gradients.gather(own.view(1), "the gradient norm"), norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped: look "
                "for the cause, or pass error_if_nonfinite=False."
            )
        if not found.nothing:  # local gradients follow, also where this rank owns none
            coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
            if grads:
                torch._foreach_mul_(grads, coefficient)
            self._gradients.scaled(coefficient)
        return total

    def averaged_gradients(self) -> Grads:
        return self._gradients.averages()

    # --- the optimizer's state ---

    def _full_state(self) -> _state.FullState:
        attached = self.attached
        if attached.layout is None:
            if self._loaded is not None:
                loaded, self._loaded = self._loaded.whole(attached.gather_lane), None
                for user in attached.users:
                    user.optimizer.state.update({param: loaded[param] for param in user.params if param in loaded})
            return {key: value for user in attached.users for key, value in user.optimizer.state.items()}
        return self._others | _state.gather(self._state, self._segments, attached.layout, attached.gather_lane)

    @contextmanager
    def full_state(self) -> Iterator[None]:
        if self._exporting:
            yield
            return
        users = self.attached.users
        if self.attached.layout is None:
            self._full_state()  # takes in what was loaded
        kept = [user.optimizer.state for user in users]
        if self.attached.layout is not None:
            self.show_full_state()
        self._exporting = True
        try:
            yield
        finally:
            for user, state in zip(users, kept, strict=True):
                user.optimizer.state = state
            self._exporting = False

    def show_full_state(self) -> None:
        if self._exporting:
            return
        full = self._full_state()
        for user in self.attached.users:
            mine = set(user.params)
            user.optimizer.state = defaultdict(dict, {p: state for p, state in full.items() if p in mine})
        self._exporting = True

    def hide_full_state(self) -> None:
        if self._exporting:
            self._exporting = False
            for number in range(len(self.attached.users)):
                self.state_was_loaded(number)  # it may have been changed

    def check_export(self) -> None:
        if not self._exporting:
            raise RuntimeError(
                "The optimizer's state is held in shards, so optimizer.state_dict() has only a part: call "
                "engine.state_dict() on every rank and save its result, or enter engine.full_state() on every rank."
            )

    def state_was_loaded(self, optimizer: int) -> None:
        layout = self.attached.layout
        if self._loaded is not None:
            self._loaded.forget(self.attached.users[optimizer].params)
        if layout is not None and not self._exporting:
            with ordinary(StepContext(self.attached.device)):
                self._cut(layout, dict(self.attached.users[optimizer].optimizer.state), (optimizer,))
            self.regroup()

    def state_parts(self) -> StateParts | None:
        if self.attached.layout is None:
            return None if self._loaded is None else self._loaded.parts
        return StateParts.of(self._state, self._segments, self._others)

    def load_state_parts(self, loaded: LoadedState) -> None:
        layout = self.attached.layout
        if layout is None:
            self._loaded = loaded
            return
        with ordinary(StepContext(self.attached.device)):
            self._cut(layout, loaded.spread(layout, self.attached.gather_lane), range(len(self.attached.users)))
        self.regroup()

    def stats(self) -> dict[str, Any]:
        users = self.attached.users
        states = [self._state] if self.attached.layout is not None else [user.optimizer.state for user in users]
        return {"optimizer_state_bytes": bytes_of(values for state in states for values in state.values())}

    def release(self) -> None:
        self._gradients.release()
        if self.attached.layout is None:
            self._full_state()  # takes in what was loaded
        else:
            self._exporting = False
            self.show_full_state()


def _forget(update: ShardedUpdate, number: int) -> None:
    """Drops an optimizer's state: this rank's part of it, and that of parameters that DDP does not reduce."""
    mine = set(update.attached.users[number].params)
    update._others = {param: state for param, state in update._others.items() if param not in mine}
    for segment in update._segments:
        if segment.optimizer == number:
            update._state.pop(segment.tensor, None)
