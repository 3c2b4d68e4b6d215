"""``update="sharded"``: each rank updates its shard of the parameters, and the updated parameters are gathered.

The optimizer's state and work are divided by the world size (ZeRO, stage 1); the bytes on the wire are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch

from dear import _C, _grads
from dear._attached import Attached, Param
from dear._changed_gradients import ChangedGradients
from dear._cuts import aligned_owners, check_fused, fused_parameters, kept_apart
from dear._flat_parameters import FlatParameters
from dear._grads import Found, Grads
from dear._held_gradients import part_with_held
from dear._layout import Layout, Segment
from dear._objects import all_gather_object
from dear._optimizer import ELEMENTWISE, Groups, UserOptimizer
from dear._own_steps import OwnSteps, has_own_step
from dear._placeholders import Placeholders
from dear._preconditioned import Preconditioning
from dear._replicas import check_replicas
from dear._sharded_gradients import ShardedGradients
from dear._sharded_state import SegmentStates
from dear._standing import Taken, held_weakly, still_kept
from dear._state_parts import LoadedState, StateParts
from dear._update import Request, Update


class ShardedUpdate(Update):
    """See the module. Before the first backward pass, state and parameters are as the user made them."""

    kind: ClassVar[str] = "sharded"
    gathers_gradients: ClassVar[bool] = False

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._flat: FlatParameters | None = None
        self._states = SegmentStates(attached, self.whole)
        self._gradients = ShardedGradients(attached)
        self._taken: Taken = []  # since the last pass
        self._changes = ChangedGradients(attached, self._gradients)
        self._preconditioning = Preconditioning(attached, self._gradients)
        self._own_steps = OwnSteps(attached.users, attached.names)
        self._fused: set[Param] = set()
        self.steps_before = 0  # steps before there was a layout, each rank's own

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        if request.compresses:
            return (
                'update="sharded" gathers updated parameters, which a compressor would spoil: leave update out, or use '
                'update="replicated".'
            )
        for optimizer in request.optimizers:
            if type(optimizer) not in ELEMENTWISE or has_own_step(optimizer):
                return (
                    f'update="sharded" cuts parameters anywhere, and {type(optimizer).__name__} is not known to update '
                    'each element on its own: use update="replicated", or update="owned" if it updates each parameter '
                    "on its own."
                )
        return request.refusal_of_aliases(cls.kind)

    # --- the layout ---

    def owners(self, layout: Layout) -> list[_C.Ownership]:
        apart = kept_apart(user.optimizer for user in self.attached.users)
        owners = super().owners(layout)
        for bucket, full in enumerate(layout.full):
            places = layout.in_bucket(bucket)
            if any(place.param in apart for place in places):
                owners[bucket] = aligned_owners(full.numel(), self.attached.world, places, full.element_size())
        return owners

    def shard_of(self, full: torch.Tensor, owners: _C.Ownership) -> torch.Tensor:
        return full.new_empty(owners.size(self.attached.rank))

    @staticmethod
    def whole(attached: Attached) -> set[Param]:
        """The parameters that must not be cut: here none."""
        return set()

    def adopt(self, layout: Layout) -> Placeholders:
        if self.attached.layout is None:  # from now on each rank's part is handed to all
            lane, device = self.attached.gather_lane, self.attached.device
            steps = max(all_gather_object(lane, self.steps_before, "the steps before the first backward pass", device))
            if steps:
                check_replicas(self.attached, steps)
        self._fused = fused_parameters(user.optimizer for user in self.attached.users)
        former = self._states.take_full(layout)
        self._flat = FlatParameters(layout)
        self._states.adopt(layout, former)
        return [(place.param, self._gradients.placeholder(layout, index)) for index, place in enumerate(layout.places)]

    def before_forward(self, reduces: bool) -> None:
        layout = self.attached.layout
        if layout is not None:
            part_with_held(self.attached, partial(self._gradients.placeholder, layout))
            if reduces and self._taken:
                taken, self._taken = still_kept(self._taken), []
                for one in taken:
                    self.attached.arrivals.at(one[0], partial(_check_let_go, self.attached, one))

    def regroup(self) -> None:
        self._states.regroup()

    def parameters_changed(self, members: bool) -> None:
        attached, layout = self.attached, self.attached.layout
        if layout is None:
            return
        assert self._flat is not None
        moved = self._flat.moved()
        if moved:
            self._flat.move_back(moved)
            for segment in self._states.segments:
                segment.tensor.data = segment.view(layout.full[segment.bucket])
        if members:
            self._states.cut_all(layout, self._states.full())
        if moved or members:
            attached.native.replace_buffers(layout.buffers(attached.optimizer_of(), len(attached.users)))

    # --- the step ---

    def step_with_closure(self, closure: Callable[[], Any] | None) -> tuple[bool, Any]:
        self._own_steps.with_closure = closure is not None  # it is called before, whoever updates what
        return False, None

    def step(self, found: Found, optimizer: int) -> None:
        attached = self.attached
        user = attached.users[optimizer]
        self._own_steps.begin(optimizer)
        attached.check_own(found.own)
        if attached.layout is None or (self._states.shows_full and not found.reduced):
            self.steps_before += attached.layout is None
            self._states.take_loaded()
            user.run_all(None)
            return
        self._states.take_back(optimizer)
        if found.missing:
            raise _grads.dropped(attached.names[found.missing[0]])
        if attached.scheduler.has_gradients():
            _grads.check_untouched(attached.native)
        pending = attached.pending_groups(optimizer)
        attached.barrier.settle(pending)  # the last step's, if this one follows without a backward pass
        assert self._flat is not None
        self._flat.copy_in()
        if found.own:
            _take(self.attached, self._states.segments, self._gradients, found.own)
            self._taken = held_weakly(found.own, self._taken)
        self._preconditioning.run(self._states.by_group)
        failed = self._update_as_reduced(optimizer)
        attached.barrier.close(pending)
        if self._flat.has_aliases:
            self.alias_waits += 1
            attached.synchronize()
        if failed is not None:
            raise failed

    def _update_as_reduced(self, optimizer: int) -> BaseException | None:
        """Each fusion group is updated once its gradients have been reduced, and gathered in the forward's order.

        Returns what the optimizer has raised. The rest is not updated then, but it is gathered: other ranks, which may
        have nothing to update where it failed, wait for it, and a script may go on with its next batch.
        """
        attached, scheduler = self.attached, self.attached.native
        user = attached.users[optimizer]
        updated: set[int] = set()
        failed: BaseException | None = None

        def run(group: int | None) -> None:
            nonlocal failed
            try:
                self._run(optimizer, group)
            except BaseException as error:
                failed = error

        if user.is_first_update:
            for index in attached.order:
                scheduler.wait_reduced(index)
            run(None)
            updated.update(attached.order)
            user.is_first_update = failed is not None

        def update(group: int) -> None:
            scheduler.wait_reduced(group)
            if failed is None:
                run(group)
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
        self._changes.conclude(optimizer, self._states.segments)
        return failed

    def _run(self, optimizer: int, group: int | None) -> None:
        """One update of an optimizer's segments in a fusion group, or in all, with the hyper-parameters as they
        stand."""
        with self.attached.native.updating(group):
            segments = [
                segment
                for index in (self.attached.order if group is None else (group,))
                for segment in self._states.by_group[index]
                if segment.optimizer == optimizer and segment.is_used(self.attached.unused)
            ]
            if segments:
                with self._changes.watch(optimizer, segments):
                    groups_of = partial(_groups_of, self.attached.users[optimizer], self._fused, segments)
                    self._own_steps.run(optimizer, segments, self._states.values, groups_of)

    def finish(self, group: int) -> None:
        assert self._flat is not None
        self._flat.copy_out(self.attached.known_layout.pending[group])

    # --- gradients ---

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        attached = self.attached
        if attached.layout is None:  # whatever is there is plain
            params = [param for user in attached.users for param in user.params]
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        attached.scheduler.synchronize()
        found = attached.look_at_grads()
        attached.check_own(found.own)
        if found.own:
            _take(self.attached, self._states.segments, self._gradients, found.own)
            self._taken = held_weakly(found.own, self._taken)
        used = [segment for segment in self._states.segments if segment.is_used(attached.unused)]
        grads = [] if found.nothing else _averages_beside(set(found.missing), used)
        each = torch._foreach_norm(grads, norm_type) if grads else [torch.zeros((), device=attached.device)]
        # One type on every rank, whichever gradients are there.
        wide = torch.float64 if any(shard.dtype == torch.float64 for shard in attached.layout.shard) else torch.float32
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
            for grad in found.own.values():  # which the script may keep
                grad.mul_(coefficient)
            scaled = {param for user in attached.users for param in user.params}.difference(found.missing)
            self._gradients.scaled(scaled, coefficient)
        return total

    def averaged_gradients(self) -> Grads:
        return self._gradients.averages()

    # --- the optimizer's state ---

    def full_state(self) -> AbstractContextManager[None]:
        return self._states.exported()

    def show_full_state(self) -> None:
        self._states.show_full()

    def hide_full_state(self) -> None:
        self._states.hide_full()

    def check_export(self) -> None:
        self._states.check_export()

    def state_was_loaded(self, optimizer: int) -> None:
        self._states.was_loaded(optimizer)

    def state_parts(self) -> StateParts | None:
        return self._states.parts()

    def load_state_parts(self, loaded: LoadedState) -> None:
        self._states.load_parts(loaded)

    def stats(self) -> dict[str, Any]:
        return {"optimizer_state_bytes": self._states.nbytes()}

    def release(self) -> None:
        self._gradients.release()
        self._states.release()


def _groups_of(
    user: UserOptimizer, fused: set[Param], segments: list[Segment], tensors: Sequence[torch.Tensor]
) -> Groups:
    """The optimizer's groups as they stand, of the tensors that stand for these segments alone."""
    work: Groups = []
    for index, options in enumerate(user.optimizer.param_groups):
        chosen = [tensor for segment, tensor in zip(segments, tensors, strict=True) if segment.group == index]
        if chosen:
            if options.get("fused"):
                check_fused(options, fused)
            work.append({**options, "params": chosen})
    return work


def _check_let_go(attached: Attached, taken: tuple[Param, weakref.ref[torch.Tensor]]) -> None:
    """A gradient comes for a parameter whose part was taken from a tensor that somebody kept."""
    if still_kept([taken]):
        raise _grads.kept(attached.names[taken[0]])


def _take(attached: Attached, segments: list[Segment], gradients: ShardedGradients, own: Grads) -> None:
    """Takes this rank's part of gradients that the user has put into ``.grad``, in place of the averages."""
    frozen = own.keys() - set(attached.params)
    if frozen:
        raise _grads.of_frozen(attached.names[frozen.pop()])
    if not attached.unused.isdisjoint(own):
        attached.unused = attached.unused - own.keys()
    attached.scheduler.synchronize()
    for segment in segments:
        for place in segment.places:
            if place.param in own:
                assert segment.tensor.grad is not None
                segment.slot(place, segment.tensor.grad).copy_(segment.part(place, own[place.param]))
    for param, placeholder in attached.placeholders:
        if param in own:
            param.grad = placeholder
    gradients.changed_otherwise(own)
    attached.changes.note_gradients([own[param] for param in attached.params if param in own])


def _averages_beside(missing: set[Param], used: list[Segment]) -> list[torch.Tensor]:
    """This rank's parts of the averages in these segments, but for those of parameters whose ``.grad`` is None, as
    where one optimizer has zeroed its gradients and another has not."""
    found = [(segment, segment.tensor.grad) for segment in used if segment.tensor.grad is not None]
    if not missing:
        return [grad for _, grad in found]
    return [
        segment.slot(place, grad) for segment, grad in found for place in segment.places if place.param not in missing
    ]
