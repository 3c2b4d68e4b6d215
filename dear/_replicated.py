"""``update="replicated"``: averaged gradients are gathered, and every rank updates everything.

A step only notes the hyper-parameters; each fusion group is updated when its gradients have come and somebody wants its
parameters. Optimizers whose update of one parameter may depend on others step at once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from dear import _C, _grads
from dear._attached import Attached, Param, weakly
from dear._context import StepContext, is_ordinary, ordinary
from dear._grads import Found, Grads
from dear._held_gradients import Shown, part_with_held, part_with_shown
from dear._layout import Layout
from dear._look_again import overlapping
from dear._optimizer import Groups
from dear._own_steps import has_own_step
from dear._pending import unguarded
from dear._placeholders import PendingGrad, Placeholders, pending_grad
from dear._standing import Standing
from dear._state_views import PendingState
from dear._update import Request, Update, bytes_of
from dear.collectives import shard_range

_LATE = 'It was raised by an update of the last optimizer.step(): update="replicated" makes it when it is needed.'


class ReplicatedUpdate(Update):
    """See the module."""

    kind: ClassVar[str] = "replicated"
    gathers_gradients: ClassVar[bool] = True

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        # Parameters that share memory must be updated in order.
        self._in_order = overlapping(attached.names) is not None
        self._own_step = has_own_step(attached.user.optimizer)
        self._to_update: set[int] = set()  # fusion groups whose update is still to come
        self._groups: Groups = []  # of the optimizer, as they were at step()
        self._group_of: dict[int, int] = {}  # of them, by the id of the parameter
        self._attributes: dict[str, Any] = {}  # likewise
        self._context = StepContext(attached.device)
        self._shown: Shown = []  # plain averages that stood in .grad since the last forward pass
        self._versions: list[int] | None = None  # of the averages, before a pass that is not reduced
        self.state_was_loaded(0)

    # --- the layout ---

    @classmethod
    def refusal(cls, request: Request) -> str | None:
        if len(request.optimizers) > 1:
            return (
                "With replicated updates, and with a compressor, dear.attach() takes one optimizer, not "
                f"{len(request.optimizers)}: make them one with several groups, or let each be elementwise or "
                "whole-matrix."
            )
        return None

    def shard_of(self, full: torch.Tensor, owners: _C.Ownership) -> torch.Tensor:
        begin, end = shard_range(full.numel(), self.attached.world, self.attached.rank)
        return full[begin:end]

    def adopt(self, layout: Layout) -> Placeholders:
        return [(place.param, self._placeholder(layout, index)) for index, place in enumerate(layout.places)]

    def _placeholder(self, layout: Layout, index: int) -> PendingGrad:
        place = layout.places[index]
        bucket = place.bucket

        def settle(update: ReplicatedUpdate) -> None:
            update._settle_gradients(update.attached.known_layout.group_of_bucket[bucket])

        # The native scheduler keeps placeholders, where the garbage collector sees no cycle.
        return pending_grad(place.view(layout.full[bucket]), place.param, weakly(self, settle))

    def before_forward(self, reduces: bool) -> None:
        """DDP and autograd touch gradients below Python: those that were kept are finished. And a pass under no_sync()
        after one that was reduced would add a local gradient to an average."""
        self._versions = None
        attached = self.attached
        if attached.layout is None:
            return
        part_with_shown(self._shown)
        self._shown.clear()
        part_with_held(attached, partial(self._placeholder, attached.layout))
        if attached.look_at_all_grads().nothing:
            return
        attached.synchronize()
        for group in attached.order:
            self._show_plain(group)
        if not reduces and attached.scheduler.has_gradients():
            self._versions = [flat._version for flat in attached.layout.full]

    def _check_untouched(self) -> None:
        _grads.check_untouched(self.attached.native)
        if self._versions not in (None, [flat._version for flat in self.attached.known_layout.full]):
            raise RuntimeError(_grads.WRITTEN_LATE)

    def parameters_changed(self, members: bool) -> None:
        self._in_order = overlapping(self.attached.names) is not None

    # --- the step ---

    def validate(self) -> None:
        self.attached.compression.validate()

    def step(self, found: Found, optimizer: int) -> None:
        attached = self.attached
        if attached.barrier.pending:  # the last step's, if this one follows without a backward pass
            attached.barrier.settle(attached.order)  # which leaves finished gradients in .grad
            found = attached.look_at_grads(optimizer)
        if attached.user.optimizer.state is not self._view:
            self.state_was_loaded(0)
        if attached.layout is not None:
            if attached.scheduler.has_gradients():
                self._check_untouched()
            attached.compression.validate()
        # What the user has put there counts, or can be changed any time.
        counts = found.own or found.plain or found.missing
        if counts or attached.user.is_first_update or attached.layout is None:
            if attached.layout is not None:
                self._finish_gradients()
            attached.user.run_all(None)
            attached.user.is_first_update = False
            return
        self._groups, self._attributes = attached.user.groups(), attached.user.attributes()
        self._group_of = {id(p): number for number, group in enumerate(self._groups) for p in group["params"]}
        self._context = StepContext.here(attached.device)
        self._to_update = set(attached.order)
        attached.barrier.close(attached.order)
        held = _C.has_aliases(attached.params) or self._view.is_held_elsewhere()
        self.alias_waits += held
        if held or not is_ordinary(attached.device):
            attached.barrier.settle(attached.order)

    def step_with_closure(self, closure: Callable[[], Any] | None) -> tuple[bool, Any]:
        """For optimizers whose update of one parameter may depend on others, or that evaluate the closure again."""
        if self.attached.user.updates_one_by_one and not self._in_order and not self._own_step:
            return False, None

        def finish() -> None:
            scheduler = self.attached.scheduler
            self.attached.check_reduced(0)
            if scheduler.has_gradients():
                self._check_untouched()
                self._finish_gradients()
                scheduler.gradients_used()

        def finished() -> Any:
            assert closure is not None
            loss = closure()
            finish()
            return loss

        if closure is None:
            finish()
        return True, self.attached.user.run_all(finished if closure is not None else None)

    def finish(self, group: int) -> None:
        attached = self.attached
        if group not in self._to_update:
            return
        self._to_update.remove(group)  # never twice, also if the optimizer fails
        with attached.native.updating(group), ordinary(self._context):
            attached.compression.arrived(group)
            try:
                self._run(self._averages(group))
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(_LATE)
                raise

    def _run(self, grads: dict[Param, torch.Tensor]) -> None:
        """One update of these parameters with these gradients and the hyper-parameters of the step.

        The optimizer gets plain tensors of one memory with the parameters, which are pending for everybody else."""
        user, view = self.attached.user, self._view
        # By the optimizer's group: looking through all its members in every fusion group would cost more than updates.
        members: dict[int, list[Param]] = {}
        for param in grads:
            if (number := self._group_of.get(id(param))) is not None:
                members.setdefault(number, []).append(param)
        if not members:
            return
        groups: Groups = []
        updated: list[tuple[Param, torch.Tensor]] = []
        for number in sorted(members):
            memories = unguarded(members[number])
            groups.append({**self._groups[number], "params": memories})
            updated += zip(members[number], memories, strict=True)
        with view.unsettled():
            state: dict[torch.Tensor, Any] = defaultdict(dict)
            for param, memory in updated:
                memory.grad = grads[param]
                if param in view:
                    state[memory] = view[param]
            user.run_aside(groups, state, self._attributes)
            for param, memory in updated:
                if memory in state:
                    view[param] = state[memory]
        with torch._C.DisableTorchFunctionSubclass():  # .grad is asked of parameters that are pending yet
            for param, _ in updated:
                if isinstance(standing := param.grad, PendingGrad):
                    self._show(param, standing, grads[param])

    # --- gradients ---

    def _averages(self, group: int) -> dict[Param, torch.Tensor]:
        attached = self.attached
        return {p: grad for p, grad in attached.known_layout.views(group).items() if p not in attached.unused}

    def _settle_gradients(self, group: int) -> None:
        """Somebody touches gradients of this fusion group, and shall find plain tensors from now on."""
        attached = self.attached
        attached.barrier.settle((group,))
        attached.compression.validate()
        attached.native.wait_gathered(group)
        self._show_plain(group)

    def _show_plain(self, group: int) -> None:
        for param, grad in self._averages(group).items():
            standing = param.grad
            if not isinstance(standing, PendingGrad):
                continue
            if standing.plain.data_ptr() == grad.data_ptr():
                self._show(param, standing, grad)
            else:  # the user has put another parameter's there
                self.attached.scheduler.synchronize()
                param.grad = standing.plain

    def _show(self, param: Param, standing: PendingGrad, grad: torch.Tensor) -> None:
        if _C.exchange_grad(param, standing, grad):
            self._shown.append((param, weakref.ref(grad)))

    def put_back(self, standing: Standing) -> None:
        attached = self.attached
        attached.scheduler.synchronize()
        if attached.compression.compressor is not None and attached.native.any_dropped():
            return  # what becomes of this step is decided in step(), by all ranks together
        for group in attached.order:
            self._show_plain(group)
        for param, kept in standing:
            average = param.grad
            if average is None or average is kept or param in attached.unused:
                continue
            if average.data_ptr() != kept.data_ptr():
                kept.copy_(average)
            else:  # it is in the bucket
                self._shown.append((param, weakref.ref(kept)))
            param.grad = kept

    def _finish_gradients(self) -> None:
        """``.grad`` of every used parameter is the averaged gradient, as a plain tensor."""
        attached = self.attached
        attached.compression.validate()
        attached.scheduler.synchronize()
        for group in attached.order:
            attached.compression.arrived(group)
            self._show_plain(group)

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        self._finish_gradients()
        return torch.nn.utils.clip_grad_norm_(self.attached.user.params, max_norm, norm_type, error_if_nonfinite)

    def averaged_gradients(self) -> Grads:
        layout = self.attached.known_layout
        return {place.param: place.view(layout.full[place.bucket]).clone() for place in layout.places}

    # --- the optimizer's state ---

    def state_was_loaded(self, optimizer: int) -> None:
        """What the user sees in ``optimizer.state`` finishes the update before it is read."""
        kept = self.attached.user.optimizer
        settle = weakly(self.attached, lambda attached: attached.barrier.settle(attached.order))
        kept.state = self._view = PendingState.of(dict(kept.state), settle)

    def stats(self) -> dict[str, Any]:
        with self._view.unsettled():
            return {"optimizer_state_bytes": bytes_of(self._view.values())}

    def release(self) -> None:
        self.attached.user.optimizer.state = self._view.copy()
