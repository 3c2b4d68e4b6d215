"""``update="sharded"``: each rank updates its shard of the parameters, and the updated parameters are gathered.

The optimizer's state and work are divided by the world size (ZeRO, stage 1); the bytes on the wire are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from dear import _C, _ddp, _grads, _state
from dear._attached import Attached, weakly
from dear._context import StepContext, ordinary
from dear._grads import Found, Grads
from dear._homes import Homes
from dear._layout import Layout, Segment, cut_segments
from dear._optimizer import ELEMENTWISE, Groups
from dear._placeholders import Placeholders, local_grad
from dear._state_views import ShardedState
from dear._update import Request, Update
from dear.collectives import shard_range


class ShardedUpdate(Update):
    """See the module. Before the first backward pass, state and parameters are as the user made them."""

    kind: ClassVar[str] = "sharded"
    gathers_gradients: ClassVar[bool] = False

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._homes: Homes | None = None
        self._segments: list[Segment] = []
        self._by_group: list[list[Segment]] = []  # by fusion group
        self._state: dict[torch.Tensor, dict[str, Any]] = {}  # by segment
        self._others: _state.FullState = {}  # of parameters that DDP does not reduce
        self._shown: Any = None  # in optimizer.state
        self._exporting = False
        # torch's foreach SGD with nesterov changes gradients in place; those that are kept would be added to so.
        self._grads_changed = self._adds_to_changed = False

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        if request.compresses:
            return (
                'update="sharded" gathers updated parameters, which a compressor would spoil: leave update out, or use '
                'update="replicated".'
            )
        if request.optimizer not in ELEMENTWISE:
            return (
                f'update="sharded" cuts parameters anywhere, and {request.optimizer.__name__} is not known to update '
                'each element on its own: use update="replicated".'
            )
        if request.shared is not None:
            first, second = request.shared
            return (
                f'The parameters {first} and {second} share memory, and update="sharded" would part them: make them '
                'one parameter, or use update="replicated".'
            )
        return None

    # --- the layout ---

    def shard_of(self, full: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return full.new_empty(end - begin)

    def adopt(self, layout: Layout) -> Placeholders:
        former = self._full_state()
        self._homes = Homes(layout)

        def before_zero(update: ShardedUpdate) -> None:
            update.attached.scheduler.synchronize()
            update.zeroed()

        settle = weakly(self, before_zero)
        self._cut(layout, former)
        return [
            (place.param, local_grad(place.view(layout.buckets[place.bucket].buffer.view(-1)), settle))
            for place in layout.places
        ]

    def _cut(self, layout: Layout, full: _state.FullState) -> None:
        """Makes segments of this rank's shards, and takes their part of the full state."""
        attached = self.attached
        # Where parameters may go unused, each is updated on its own.
        merge = not _ddp.tracks_unused(attached.model)
        group_of = {p: i for i, group in enumerate(attached.user.optimizer.param_groups) for p in group["params"]}
        self._segments = cut_segments(
            layout, attached.world, attached.rank, group_of,
            lambda param: _state.kind(full.get(param, {})) if merge else id(param),
        )  # fmt: skip
        self._state = defaultdict(dict, _state.scatter(full, self._segments))
        here = {place.param for place in layout.places}
        self._others = {param: state for param, state in full.items() if param not in here}
        self._shown = ShardedState(weakly(attached, lambda _: self._state.clear()))
        attached.user.optimizer.state = self._shown

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
                segment.tensor.data = layout.full[segment.bucket][segment.start : segment.stop]
            attached.scheduler.replace_buffers(list(zip(layout.shard, layout.full, strict=True)))
        if members:
            self._cut(layout, self._full_state())

    def before_forward(self, reduces: bool) -> None:
        if self._grads_changed and not _grads.look(self.attached.placeholders).nothing:
            self._adds_to_changed = True

    def zeroed(self) -> None:
        self._adds_to_changed = False

    # --- the step ---

    def step(self, found: Found) -> None:
        attached = self.attached
        if self._adds_to_changed and attached.scheduler.has_gradients():
            raise _grads.added_to_changed(type(attached.user.optimizer).__name__)
        if attached.layout is None:
            attached.user.run_all(None)
            return
        if attached.user.optimizer.state is not self._shown:  # the user's own
            self.state_was_loaded()
        if found.missing:
            raise _grads.dropped(attached.names[found.missing[0]])
        if attached.scheduler.has_gradients():
            attached.scheduler.check_untouched()
        attached.barrier.settle(attached.order)  # the last step's, if this one follows without a backward pass
        assert self._homes is not None
        self._homes.fetch_guests()
        self._take(found.own)
        self._update_as_reduced()
        attached.barrier.close(attached.order)
        if self._homes.has_aliases:
            attached.synchronize()

    def _update_as_reduced(self) -> None:
        """Each fusion group is updated once its gradients have been reduced, and gathered in the forward's order."""
        attached, scheduler = self.attached, self.attached.scheduler
        updated: set[int] = set()

        def update(group: int) -> None:
            scheduler.wait_reduced(group)
            self._run([group], f"fusion group {group}")
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
            scheduler.submit_gather(index)

    def _take(self, own: Grads) -> None:
        """Takes this rank's part of gradients that the user has put into ``.grad``, in place of the averages."""
        if not own:
            return
        self.attached.scheduler.synchronize()
        for segment in self._segments:
            for place in segment.places:
                if place.param in own:
                    start, stop = max(segment.start, place.start), min(segment.stop, place.stop)
                    flat = place.flatten(own[place.param])
                    assert segment.tensor.grad is not None
                    part = segment.tensor.grad[start - segment.start : stop - segment.start]
                    part.copy_(flat[start - place.start : stop - place.start])
        for param, placeholder in self.attached.placeholders:
            if param in own:
                param.grad = placeholder

    def _run(self, groups: Iterable[int], name: str) -> None:
        """One update of these fusion groups' segments, with the hyper-parameters as they stand."""
        start = _C.now_ns()
        user = self.attached.user
        segments = [segment for index in groups for segment in self._by_group[index] if self._is_used(segment)]
        work: Groups = []
        for index, group in enumerate(user.optimizer.param_groups):
            tensors = [segment.tensor for segment in segments if segment.group == index]
            if tensors:
                work.append({**group, "params": tensors})
        if work:
            grads = [segment.tensor.grad for segment in segments]
            versions = [grad._version for grad in grads if grad is not None]
            user.run(work, self._state)
            self._grads_changed |= versions != [grad._version for grad in grads if grad is not None]
        self.attached.scheduler.trace("update", name, start, _C.now_ns())

    def _is_used(self, segment: Segment) -> bool:
        return segment.places[0].param not in self.attached.unused

    def finish(self, group: int) -> None:
        self.attached.scheduler.wait_gathered(group)
        assert self._homes is not None
        self._homes.serve_guests(self.attached.known_layout.groups[group])

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
        self._gather(norms, "the gradient norm")
        return norms

    def _gather(self, flat: torch.Tensor, label: str) -> None:
        """Completes a flat tensor of which each rank has its shard. Collective."""
        lane = self.attached.gather_lane
        begin, end = shard_range(flat.numel(), self.attached.world, self.attached.rank)
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(flat, flat[begin:end])], label).wait()

    def averaged_gradients(self) -> Grads:
        attached, layout = self.attached, self.attached.known_layout
        flats = [torch.empty_like(flat) for flat in layout.full]
        for flat, shard in zip(flats, layout.shard, strict=True):
            begin, end = shard_range(flat.numel(), attached.world, attached.rank)
            flat[begin:end] = shard
            self._gather(flat, "the gradients")
        return {place.param: place.view(flats[place.bucket]).clone() for place in layout.places}

    # --- the optimizer's state ---

    def _full_state(self) -> _state.FullState:
        attached = self.attached
        if attached.layout is None:
            return dict(attached.user.optimizer.state)
        return self._others | _state.gather(self._state, self._segments, attached.layout, attached.gather_lane)

    @contextmanager
    def full_state(self) -> Iterator[None]:
        optimizer = self.attached.user.optimizer
        kept = optimizer.state
        if self.attached.layout is not None:
            optimizer.state = defaultdict(dict, self._full_state())
        self._exporting = True
        try:
            yield
        finally:
            optimizer.state, self._exporting = kept, False

    def check_export(self) -> None:
        if not self._exporting:
            raise RuntimeError(
                "The optimizer's state is held in shards, so optimizer.state_dict() has only a part: call "
                "engine.state_dict() on every rank, and save its result."
            )

    def state_was_loaded(self) -> None:
        layout = self.attached.layout
        if layout is not None:
            with ordinary(StepContext(self.attached.device)):
                self._cut(layout, dict(self.attached.user.optimizer.state))
            self.regroup()

    def state_bytes(self) -> int:
        state = self._state if self.attached.layout is not None else self.attached.user.optimizer.state
        return sum(v.nbytes for values in state.values() for v in values.values() if isinstance(v, torch.Tensor))

    def release(self) -> None:
        if self.attached.layout is not None:
            self.attached.user.optimizer.state = defaultdict(dict, self._full_state())
