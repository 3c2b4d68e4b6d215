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
from dear._context import StepContext, ordinary
from dear._grads import Found, Grads
from dear._homes import Homes
from dear._layout import Layout, Segment, cut_segments
from dear._optimizer import ELEMENTWISE, Groups
from dear._placeholders import Placeholders, local_grad
from dear._state_views import ShardedState
from dear._update import Request, Update


class ShardedUpdate(Update):
    """See the module. Before the first backward pass, state and parameters are as the user made them."""

    kind: ClassVar[str] = "sharded"
    gathers_gradients: ClassVar[bool] = False

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._homes: Homes | None = None
        self._segments: list[Segment] = []
        self._by_group: list[list[Segment]] = []  # by fusion group
        self._state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)  # by segment
        self._shown: list[Any] = [None] * len(attached.users)  # in optimizer.state
        self._exporting = False

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
        former = self._full_state()
        self._homes = Homes(layout)
        self._segments = []
        self._state.clear()
        settle = weakly(self.attached, lambda attached: attached.scheduler.synchronize())
        self._cut(layout, former, range(len(self.attached.users)))
        return [
            (place.param, local_grad(place.view(layout.buckets[place.bucket].buffer.view(-1)), settle))
            for place in layout.places
        ]

    def _cut(self, layout: Layout, full: _state.FullState, numbers: Iterable[int]) -> None:
        """Makes segments of what this rank owns of these optimizers' parameters, and takes their part of the full
        state."""
        attached = self.attached
        # Where parameters may go unused, each is updated on its own.
        merge = not _ddp.tracks_unused(attached.model)
        whole = self.whole()
        for number in numbers:
            optimizer = attached.users[number].optimizer
            self._forget(number)
            self._segments = [segment for segment in self._segments if segment.optimizer != number]
            group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            segments = cut_segments(
                layout, attached.rank, number, group_of, whole,
                lambda param: _state.kind(full.get(param, {})) if merge else id(param),
            )  # fmt: skip
            self._segments += segments
            self._state.update(_state.scatter(full, segments))
            shown = ShardedState(weakly(self, functools.partial(type(self)._forget, number=number)))
            optimizer.state = self._shown[number] = shown

    def _forget(self, number: int) -> None:
        """Drops this rank's part of an optimizer's state."""
        for segment in self._segments:
            if segment.optimizer == number:
                self._state.pop(segment.tensor, None)

    def regroup(self) -> None:
        layout = self.attached.known_layout
        self._by_group = [[] for _ in layout.groups]
        for segment in self._segments:
            self._by_group[layout.group_of_bucket[segment.bucket]].append(segment)

    def parameters_changed(self, members: bool) -> None:
        attached, layout = self.attached, self.attached.layout
        if layout is None:
            return
        assert self._homes is not None
        moved = self._homes.moved()
        if moved:
            self._homes.return_home(moved)
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
        if attached.layout is None:
            user.run_all(None)
            return
        if user.optimizer.state is not self._shown[optimizer]:  # the user's own
            self.state_was_loaded(optimizer)
        if found.missing:
            raise _grads.dropped(attached.names[found.missing[0]])
        if attached.scheduler.has_gradients():
            attached.scheduler.check_untouched()
        pending = attached.pending_groups(optimizer)
        attached.barrier.settle(pending)  # the last step's, if this one follows without a backward pass
        assert self._homes is not None
        self._homes.fetch_guests()
        self._take(found.own)
        self._update_as_reduced(optimizer)
        attached.barrier.close(pending)
        if self._homes.has_aliases:
            attached.synchronize()

    def _update_as_reduced(self, optimizer: int) -> None:
        """Each fusion group is updated once its gradients have been reduced, and gathered in the forward's order."""
        attached, scheduler = self.attached, self.attached.scheduler
        updated: set[int] = set()

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
            if segment.optimizer == optimizer and self._is_used(segment)
        ]
        work: Groups = []
        for index, group in enumerate(user.optimizer.param_groups):
            tensors = [segment.tensor for segment in segments if segment.group == index]
            if tensors:
                work.append({**group, "params": tensors})
        if work:
            user.run(work, self._state)
        self.attached.scheduler.trace("update", name, start, _C.now_ns())

    def _is_used(self, segment: Segment) -> bool:
        return segment.places[0].param not in self.attached.unused

    def finish(self, group: int) -> None:
        attached = self.attached
        index, optimizer = divmod(group, len(attached.users))
        attached.scheduler.wait_gathered(index, optimizer)
        assert self._homes is not None
        self._homes.serve_guests(attached.known_layout.pending[group])

    # --- gradients ---

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        attached = self.attached
        attached.scheduler.synchronize()
        found = _grads.look(attached.expected())
        self._take(found.own)
        used = [] if found.nothing else [segment for segment in self._segments if self._is_used(segment)]
        grads = [segment.tensor.grad for segment in used if segment.tensor.grad is not None]
        each = list(torch._foreach_norm(grads, norm_type)) if grads else []
        norms = self._norms(torch.stack([norm.float() for norm in each]).norm(norm_type) if each else None)
        total = torch.linalg.vector_norm(norms, norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped: look "
                "for the cause, or pass error_if_nonfinite=False."
            )
        if grads:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    def _norms(self, own: torch.Tensor | None) -> torch.Tensor:
        """One number of every rank, in the all-gather lane, so that a missing peer is named as everywhere."""
        attached = self.attached
        norms = torch.zeros(attached.world, dtype=torch.float32, device=attached.device)
        mine = norms[attached.rank : attached.rank + 1]
        if own is not None:
            mine.copy_(own)
        attached.gather_lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(norms, mine)], "the gradient norm").wait()
        return norms

    def averaged_gradients(self) -> Grads:
        attached, layout = self.attached, self.attached.known_layout
        flats = [torch.empty_like(flat) for flat in layout.full]
        for bucket, (flat, shard) in enumerate(zip(flats, layout.shard, strict=True)):
            layout.unpack(bucket, attached.rank, shard, flat)
            layout.gather(attached.gather_lane, bucket, flat, "the gradients")
        return {place.param: place.view(flats[place.bucket]).clone() for place in layout.places}

    # --- the optimizer's state ---

    def _full_state(self) -> _state.FullState:
        attached = self.attached
        if attached.layout is None:
            return {key: value for user in attached.users for key, value in user.optimizer.state.items()}
        return _state.gather(self._state, self._segments, attached.layout, attached.gather_lane)

    @contextmanager
    def full_state(self) -> Iterator[None]:
        users = self.attached.users
        kept = [user.optimizer.state for user in users]
        if self.attached.layout is not None:
            self._put_full_state()
        self._exporting = True
        try:
            yield
        finally:
            for user, state in zip(users, kept, strict=True):
                user.optimizer.state = state
            self._exporting = False

    def _put_full_state(self) -> None:
        """Each optimizer has its full state. Collective."""
        full = self._full_state()
        for user in self.attached.users:
            mine = set(user.params)
            user.optimizer.state = defaultdict(dict, {p: state for p, state in full.items() if p in mine})

    def check_export(self) -> None:
        if not self._exporting:
            raise RuntimeError(
                "The optimizer's state is held in shards, so optimizer.state_dict() has only a part: call "
                "engine.state_dict() on every rank, and save its result."
            )

    def state_was_loaded(self, optimizer: int) -> None:
        layout = self.attached.layout
        if layout is not None:
            with ordinary(StepContext(self.attached.device)):
                self._cut(layout, dict(self.attached.users[optimizer].optimizer.state), (optimizer,))
            self.regroup()

    def state_bytes(self) -> int:
        users = self.attached.users
        states = [self._state] if self.attached.layout is not None else [user.optimizer.state for user in users]
        return sum(
            value.nbytes
            for state in states
            for values in state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )

    def release(self) -> None:
        if self.attached.layout is not None:
            self._put_full_state()
