"""When things move: bucket layouts, fusion groups, and what a forward pass begins and ends with.

Note [The life of a gradient]
 1. backward: DDP fills a bucket; the native hook reduce-scatters each fusion group as its last bucket comes.
 2. step(): the update strategy updates what is to be updated now, and leaves parameters pending.
 3. forward: whoever reads a pending parameter waits for its fusion group, and finishes it.
The first backward pass brings the bucket layout. It is adopted at the end of that pass, and everything moves then.

Note [One layout]
DDP begins with one bucket and lays them anew before its second forward pass, in the order in which gradients came. A
sum's order, and so its last bit, depends on where an element stands in its bucket: a resumed run must have the layout
of the run that it continues from its first step on. So DDP is made to rebuild at the end of its first backward pass,
before anything is sent, and the order is part of the engine's state: it holds again also where the first pass after
resuming takes another branch of the model. With a static graph DDP would note that order in its second pass, and with
``find_unused_parameters`` never: there it is the reverse of the model's.
"""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch.autograd import Variable

from dear import _C, _ddp, _grads
from dear._attached import Attached, Param
from dear._bucket_order import BucketOrder
from dear._compiled import uncompiled
from dear._context import StepContext, ordinary
from dear._first_pass import check_begins, check_learns
from dear._fusion import MIB, ddp_bucket_bytes, fuse, gather_order
from dear._layout import Layout, read_places
from dear._look_again import Facts, overlapping
from dear._objects import broadcast_object
from dear._observe import ForwardOrder
from dear._own_calls import OwnCalls
from dear._placeholders import Placeholders
from dear._standing import Standing, kept_elsewhere, lies_in
from dear._update import Request, Update


class Schedule:
    """A DDP module with the native scheduler as its hook."""

    def __init__(self, attached: Attached, update: Update, bucket_cap_mb: float) -> None:
        self._attached, self._update = attached, update
        self.watches_forward = True
        self._group_bytes = int(bucket_cap_mb * MIB)
        self._forward: ForwardOrder | None = None  # None until there is a pass to watch
        self._position: dict[Param, int] = {}  # in the forward pass, as rank 0 saw it
        self._standing: Standing = []  # kept by somebody, and to be put back at the end of the backward pass
        self._kept: Placeholders = []  # that stood in .grad when a forward pass began, whose step is still to come
        self._facts = Facts(attached.model, attached.names, attached.params)
        self.bucket_order = BucketOrder(attached)
        self._take_over()

    def _take_over(self) -> None:
        """Puts the hook into a reducer of its own. Collective."""
        attached = self._attached
        model, scheduler = attached.model, attached.native
        # The scheduler must not keep the engine alive: it is owned by the reducer, the reducer by the model.
        me = weakref.ref(self)

        @uncompiled
        def backward_ended(layout_is_new: bool) -> None:
            me()._backward_ended(layout_is_new)  # type: ignore[union-attr]

        always = _ddp.tracks_unused(model) or attached.preconditioning.preconditioner is not None
        scheduler.set_backward_ended(backward_ended, always)
        self._former_options = former = _ddp.reducer_options(model)
        # What is compressed together lies together: then a fusion group is one bucket.
        compresses = attached.compression.compressor is not None
        cap = min(former.cap, self._group_bytes if compresses else ddp_bucket_bytes(self._group_bytes))
        # Local gradients stay in DDP's buckets, whatever the user has chosen: no second copy of the model's size.
        self._options = _ddp.ReducerOptions(cap, min(former.first, cap), views=True)
        # See Note [One layout].
        order = _ddp.in_reducer_order(model, attached.params)[::-1] if model.static_graph else None
        kept = kept_elsewhere(attached.params, [], views=former.views)
        self._rebuild_reducer(order)
        for param, grad in kept:  # the new reducer has put views of its buckets there
            param.grad = grad
        self._own_calls = OwnCalls(model, attached.gather_lane, attached.device)

    def _rebuild_reducer(self, order: list[Param] | None) -> None:
        attached = self._attached
        model, scheduler = attached.model, attached.native
        attached.unreduced = None
        self._reducer_order = _ddp.rebuild_reducer(model, self._options, attached.params, order)
        self.hook_calls = _ddp.register(model, scheduler)
        if not self._update.gathers_gradients:
            attached.unreduced = _ddp.unreduced(model, attached.params, scheduler)

    @property
    def group_bytes(self) -> int:
        """Size of a fusion group."""
        return self._group_bytes

    @group_bytes.setter
    def group_bytes(self, value: int) -> None:
        self._group_bytes = value
        if self._attached.layout is not None:
            self.regroup()

    # --- the layout ---

    def _backward_ended(self, layout_is_new: bool) -> None:
        attached = self._attached
        if layout_is_new:
            check_learns(attached.model, attached.params, "dear.attach()")
            with ordinary(StepContext(attached.device, grad=False)):
                self._adopt_layout()
        if self._standing:
            Variable._execution_engine.queue_callback(self._put_back)
        attached.preconditioning.backward_ended()
        used = _ddp.used_parameters(attached.model, self._reducer_order)
        if used is None:
            return
        # One that has a gradient of an earlier pass is sent with the others, and has its average again.
        used |= {param for param in attached.params if param.grad is not None}
        attached.unused = set(attached.params) - used
        shown = [(param, placeholder) for param, placeholder in attached.placeholders if param in used]
        _C.set_python_dispatch([placeholder for _, placeholder in shown], True)
        for param, placeholder in shown:
            param.grad = placeholder
        attached.compression.note_unused(attached.unused)

    def _adopt_layout(self) -> None:
        attached, update = self._attached, self._update
        attached.synchronize()
        with self._own_calls.rebuild():
            _ddp.rebuild_buckets(attached.model, attached.native)
        self._agree_on_order()
        buckets = attached.native.incoming()
        full = [self._flat_of(bucket) for bucket in buckets]
        layout = Layout(buckets, read_places(buckets, attached.params), full)
        layout.fuse(self._sizes(layout))
        layout.owners = update.owners(layout)
        layout.shard = [update.shard_of(flat, own) for flat, own in zip(full, layout.owners, strict=True)]
        attached.placeholders = update.adopt(layout)
        attached.layout = layout
        exchanges = attached.compression.exchanges(buckets, full)
        sizes = self._fuse()
        # Where parameters may go unused, DDP tells which after the pass, and the others get theirs then.
        placeholders = [] if _ddp.tracks_unused(attached.model) else attached.placeholders
        buffers = layout.buffers(attached.optimizer_of(), len(attached.users))
        attached.native.adopt_layout(buffers, exchanges, placeholders, sizes, attached.order)
        update.regroup()
        self._facts.note()

    def _flat_of(self, bucket: _C.Bucket) -> torch.Tensor:
        """Where the all-gather completes the bucket: gradients in the place of the local ones, which were read by then;
        anything else in memory of its own. A version counter of its own tells results from writes to gradients."""
        if self._update.gathers_gradients:
            return bucket.buffer.view(-1).data
        return bucket.buffer.new_empty(bucket.buffer.numel())

    def _agree_on_order(self) -> None:
        """Rank 0's forward order becomes everyone's: all ranks must queue the same all-gathers. So does the order of
        the buckets that it has loaded."""
        attached = self._attached
        index = {param: i for i, param in enumerate(attached.params)}
        seen = [index[param] for param in self._forward.seen] if self._forward else []
        known = (seen, self.bucket_order.wanted)
        found = broadcast_object(attached.gather_lane, known, "the order of the forward pass", attached.device)
        seen, self.bucket_order.wanted = found
        self._position = {attached.params[i]: place for place, i in enumerate(seen)}
        order = self.bucket_order.take(attached.native.incoming())
        if order is not None:
            self._rebuild_reducer(order)
            _C.take_buckets(attached.model.reducer, attached.native)

    def _fuse(self) -> list[int]:
        """Makes fusion groups of the layout's buckets; returns how many buckets are in each."""
        attached = self._attached
        layout = attached.known_layout
        sizes = self._sizes(layout)
        layout.fuse(sizes)
        layout.split(attached.optimizer_of(), len(attached.users))
        attached.order = gather_order([[place.param for place in places] for places in layout.groups], self._position)
        attached.barrier.set_groups([place.param for place in places] for places in layout.pending)
        return sizes

    def _sizes(self, layout: Layout) -> list[int]:
        """How many buckets each fusion group shall have."""
        if self._attached.compression.compressor is not None:
            return [1] * len(layout.full)
        return fuse([flat.nbytes for flat in layout.full], self._group_bytes)

    def regroup(self) -> None:
        """Makes the fusion groups anew. Nothing may be pending."""
        sizes = self._fuse()
        self._attached.native.regroup(sizes, self._attached.order)
        self._update.regroup()

    # --- step boundaries ---

    def look_again(self) -> None:
        """Adopts what has changed in the model or in the optimizer since the last step boundary, as DDP would train
        it, or refuses it."""
        if adopt_changes(self._attached, self._update, self._facts) and self._attached.layout is not None:
            self.regroup()

    def unclaimed(self) -> None:
        """No step has used the last gradients, and maybe none will: what unused parameters got is not lost."""
        attached = self._attached
        attached.compression.validate()
        if attached.unused:
            attached.scheduler.synchronize()
            for group in attached.order:
                attached.compression.arrived(group)

    # --- forward ---

    def before_forward(self) -> None:
        """Called before every forward of the DDP module."""
        with ordinary(StepContext.here(self._attached.device)):  # modes of the user's see the model's work alone
            self._prepare_forward()

    def _prepare_forward(self) -> None:
        attached = self._attached
        if attached.scheduler.has_gradients():  # a backward whose gradients no step has used: they are added to
            attached.scheduler.synchronize()
            self.unclaimed()
        if not torch.is_grad_enabled():
            attached.synchronize()
            return
        self.look_again()
        reduces = attached.model.require_backward_grad_sync
        if attached.scheduler.passes() == 0:
            check_begins(attached.model, "dear.attach()")
        wanted = reduces and attached.layout is not None and self.bucket_order.wanted
        if wanted and self.bucket_order.asks_to_leave(attached.known_layout.buckets):
            attached.synchronize()
            attached.native.forget_layout()
        if reduces:
            again = attached.passes_before_forward == attached.scheduler.passes()
            attached.forward_passes = attached.forward_passes + 1 if again else 1
            attached.passes_before_forward = attached.scheduler.passes()
        else:
            attached.passes_before_local = attached.scheduler.passes()
        if attached.arrivals.handles:
            attached.arrivals.clear()
        self._update.before_forward(reduces)
        if reduces:
            self._look_for_kept()
        # DDP rebuilds its buckets now, and then puts views of the new ones, with local gradients, into .grad.
        kept = attached.placeholders if attached.scheduler.has_gradients() else []
        self._kept = [(param, placeholder) for param, placeholder in kept if param.grad is placeholder]
        if self._forward is None:
            attached.synchronize()
            self._forward = ForwardOrder(attached.params)
        self._own_calls.before_forward(delivered=attached.scheduler.passes() > 0)

    def _look_for_kept(self) -> None:
        """Looks for tensors in ``.grad`` that somebody keeps, before a pass that is reduced."""
        attached, layout = self._attached, self._attached.layout
        self._standing = []
        if layout is not None and not _has_others(attached.look_at_all_grads()):
            return
        buckets = [] if layout is None else layout.full
        found = kept_elsewhere(attached.params, buckets, views=self._former_options.views)
        for param, kept in found:
            attached.arrivals.at(param, partial(self._came, param, kept))
        if found and self._update.gathers_gradients:
            attached.native.ask_for_backward_end()

    def _came(self, param: Param, kept: torch.Tensor) -> None:
        """A gradient comes for a parameter whose ``.grad`` was kept by somebody as the forward pass began.

        Raises:
            RuntimeError: it stands there still, and gradients are reduced in shards, so nothing could be put back.
        """
        attached = self._attached
        with torch._C.DisableTorchFunctionSubclass():
            stands = param.grad is kept
        if stands:
            if not self._update.gathers_gradients:
                raise _grads.kept(attached.names[param])
            self._standing.append((param, kept))
        elif attached.layout is not None and lies_in(kept, attached.layout.full):
            kept.data = kept.clone()  # the pass writes to the bucket

    def _put_back(self) -> None:
        """At the end of a backward pass, when the native scheduler has put placeholders into ``.grad``."""
        standing, self._standing = self._standing, []
        with ordinary(StepContext(self._attached.device, grad=False)):
            self._update.put_back(standing)

    def after_forward(self, failed: bool) -> None:
        """Called after every forward of the DDP module, also after one that ``failed``."""
        with ordinary(StepContext.here(self._attached.device)):
            self._conclude_forward(failed)

    def _conclude_forward(self, failed: bool) -> None:
        attached = self._attached
        for param, placeholder in self._kept:
            param.grad = placeholder
        self._kept = []
        if self._forward is not None and self._forward.watching:
            self._forward.close()
            if failed and attached.layout is None:
                self._forward = None  # the next one shall tell
        # Groups that no module has asked for in this pass (a branch not taken): backward may write to their buckets.
        if not failed and (attached.barrier.pending or attached.native.gathering()):
            attached.synchronize()

    # --- the end ---

    def release(self) -> None:
        """Takes the hook off the model, which is plain DDP's again."""
        attached = self._attached
        attached.native.clear_backward_ended()
        attached.arrivals.clear()
        attached.unreduced = None
        self._own_calls.release()
        if self._forward is not None:
            self._forward.close()
        attached.barrier.give_up()

    def restore_reducer(self) -> bool:
        """Gives DDP a reducer as it had. Collective, as building DDP is. Returns whether it is another one."""
        _ddp.rebuild_reducer(self._attached.model, self._former_options, self._attached.params)
        return True


def _has_others(found: _grads.Found) -> bool:
    """Whether other tensors than placeholders stand in ``.grad``."""
    return bool(found.own) or found.plain


def adopt_changes(attached: Attached, update: Update, facts: Facts) -> bool:
    """Whether the model or an optimizer has changed since ``facts`` were noted; the update strategy has adopted it.

    Raises:
        RuntimeError, ValueError: training cannot go on so; the next step boundary refuses it again.
    """
    members, places = any(user.has_other_members() for user in attached.users), facts.changed()
    if not members and not places:
        return False
    attached.synchronize()
    facts.check()
    facts.check_members([param for user in attached.users for param in user.listed()])
    compresses = attached.compression.compressor is not None
    optimizers = tuple(user.optimizer for user in attached.users)
    refusal = update.refusal(Request(optimizers, compresses, overlapping(attached.names) if places else None))
    if refusal is not None:
        raise RuntimeError(refusal)
    for user in attached.users:
        user.note_members()
    try:
        update.parameters_changed(members)
    except RuntimeError:
        for user in attached.users:
            user.forget_members()  # so that the next step boundary refuses them again
        raise
    facts.note()
    return True
