"""The schedule without its owner: bucket layouts, fusion groups, and what a forward pass must wait for.

:class:`Schedule` knows when things move; :class:`dear.engine.Engine` adds the optimizer's step and the public calls.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C, _ddp, _grads, _state
from dear._fusion import MIB, ddp_bucket_bytes, fuse, gather_order
from dear._hooks import ModelHooks
from dear._layout import Layout, Segment, cut_segments, read_places, rehome
from dear._observe import ForwardWatch
from dear._stand_in import local_grad, pending_grad
from dear._update import ReplicatedUpdate, ShardedUpdate
from dear.collectives import group_timeout, make_lane, shard_range

if TYPE_CHECKING:
    from compress import Compressor
    from compress.scheduled import ScheduleDriver


class Schedule:
    """A DDP module with the native scheduler as its hook, and its parameters where the scheduler wants them."""

    def __init__(
        self,
        model: DDP,
        optimizer: Optimizer,
        mode: str,
        bucket_cap_mb: float,
        group: dist.ProcessGroup,
        algorithm: str,
        device: torch.device,
        compressor: Compressor | None = None,
    ) -> None:
        self._model, self._optimizer, self._group = model, optimizer, group
        self._mode = mode
        self._group_bytes = int(bucket_cap_mb * MIB)
        self._params = [param for param in model.module.parameters() if param.requires_grad]
        self._managed = [param for g in optimizer.param_groups for param in g["params"]]
        self._rank, self._world = group.rank(), group.size()
        self._layout: Layout | None = None
        self._watch: ForwardWatch | None = None
        self._order: list[int] = []
        self._segments: list[list[Segment]] = []  # by fusion group
        self._to_update: set[int] = set()  # replicated: groups whose update is still to come

        timeout = group_timeout(group, device)
        self._gather_lane = make_lane(group, "all-gather", algorithm, timeout)  # type: ignore[arg-type]
        reduce_lane = make_lane(group, "reduce-scatter", algorithm, timeout)  # type: ignore[arg-type]
        self._scheduler = _C.Scheduler(reduce_lane, self._gather_lane, mode == "replicated")
        # The scheduler must not keep the engine alive: it is owned by the reducer, the reducer by the model.
        me = weakref.ref(self)
        self._scheduler.set_backward_ended(lambda new: me()._backward_ended(new), _ddp.tracks_unused(model))  # type: ignore[union-attr]

        self._compression: ScheduleDriver | None = None
        if compressor is not None:
            self._compression = self._compress(compressor, device, [reduce_lane, self._gather_lane], algorithm)

        self._reducer_options = _ddp.reducer_options(model)
        # What is compressed together lies together: then a fusion group is one bucket.
        buckets = self._group_bytes if compressor is not None else ddp_bucket_bytes(self._group_bytes)
        cap = min(self._reducer_options.cap, buckets)
        first = min(self._reducer_options.first, cap)
        # Local gradients stay in the buckets when nobody else may read them: a copy less.
        views = self._reducer_options.views or mode == "sharded"
        _ddp.rebuild_reducer(model, _ddp.ReducerOptions(cap, first, views))
        self._reducer_params = _ddp.reducer_parameters(model)
        self._hook_calls = _ddp.register(model, self._scheduler)

        self._original_step = optimizer.step
        self._sharded = ShardedUpdate(optimizer, self._original_step)
        self._replicated = ReplicatedUpdate(optimizer, self._original_step)
        self._hooks = ModelHooks(model, self._scheduler, self)
        self._hooks.install(optimizer, sharded=mode == "sharded")

    def _compress(
        self, compressor: Compressor, device: torch.device, lanes: list[_C.Lane], algorithm: str
    ) -> ScheduleDriver:
        from compress.scheduled import ScheduleDriver  # compress needs dear

        me = weakref.ref(self)  # the compressor must not keep the engine alive either
        driver = ScheduleDriver(compressor, self._model, device, lanes, algorithm, self._scheduler, _finisher(me))
        compressor.driver = driver
        self._scheduler.set_pipeline(driver.pipeline)
        return driver

    @property
    def update(self) -> str:
        """``"sharded"`` or ``"replicated"``."""
        return self._mode

    def synchronize(self) -> None:
        """Waits until nothing is in flight and every parameter is finished.

        Raises:
            RuntimeError: a peer has died or stalled; names the rank, the phase and the fusion group.
        """
        self._scheduler.synchronize()
        for index in list(self._order):
            self._apply(index)

    def _apply(self, index: int) -> None:
        """Replicated: the update of one fusion group, once, when its gradients have come."""
        if index not in self._to_update:
            return
        assert self._layout is not None
        self._scheduler.wait_gathered(index)
        self._to_update.discard(index)
        self._arrived(index)
        start = _C.now_ns()
        self._replicated.run(self._grads_of(index))
        self._scheduler.trace("update", f"fusion group {index}", start, _C.now_ns())

    # --- compression ---

    def _judge(self) -> None:
        """To be called before the results of a backward pass are used: they may be bad, and the compressor says so."""
        if self._compression is not None:
            self._compression.judge()

    def _arrived(self, index: int) -> None:
        """The averaged gradients of a fusion group stand, and were judged."""
        if self._compression is not None:
            self._compression.arrived(index)

    def _unclaimed(self) -> None:
        """No step has used the last gradients, and maybe none will: unused parameters' results are not lost."""
        self._judge()
        if self._compression is not None and self._unused:
            self._scheduler.synchronize()
            for index in self._order:
                self._arrived(index)

    def _grads_of(self, index: int) -> dict[torch.nn.Parameter, torch.Tensor]:
        assert self._layout is not None
        return {param: grad for param, grad in self._layout.views(index).items() if param not in self._unused}

    def _gathered_state(self) -> Any:
        assert self._layout is not None
        full = _state.gather(self._sharded.state, self._sharded.segments, self._layout, self._gather_lane, self._group)
        return defaultdict(dict, full)

    def _plain_state(self) -> Any:  # torch says that its keys are any tensors
        return dict(self._optimizer.state)

    def state_was_loaded(self) -> None:
        """The optimizer has just loaded a full state: keep this rank's part of it."""
        if self._mode == "sharded" and self._layout is not None:
            self._set_segments(self._plain_state(), not _ddp.tracks_unused(self._model))
            self._regroup()

    # --- the layout ---

    def _backward_ended(self, layout_is_new: bool) -> None:
        if layout_is_new:
            self._adopt_layout()
        used = _ddp.used_parameters(self._model, self._reducer_params)
        self._unused = set() if used is None else set(self._params) - used
        if used is not None:
            for param, stand_in in self._stand_ins:
                if param in used:
                    param.grad = stand_in
            if self._compression is not None:
                self._compression.note_unused(self._unused)

    _unused: set[torch.nn.Parameter] = set()  # noqa: RUF012 - replaced, never changed
    _stand_ins: _grads.StandIns = []  # noqa: RUF012 - likewise
    _expected: _grads.StandIns = []  # noqa: RUF012 - those of the optimizer's parameters

    def _adopt_layout(self) -> None:
        buckets = self._scheduler.incoming()
        sharded = self._mode == "sharded"
        self._apply_all_before_new_layout()
        former: _state.FullState = {}
        if sharded:
            former = self._gathered_state() if self._layout is not None else self._plain_state()
        full = [bucket.buffer.new_empty(bucket.buffer.numel()) for bucket in buckets]
        begins = [shard_range(flat.numel(), self._world, self._rank) for flat in full]
        places = read_places(buckets, self._params)
        me = weakref.ref(self)  # the scheduler holds the stand-ins and must not hold the engine
        grads: _grads.StandIns
        if sharded:
            rehome(places, full)
            shard = [flat.new_empty(end - begin) for flat, (begin, end) in zip(full, begins, strict=True)]
            grads = [(place.param, local_grad(place.view(buckets[place.bucket].buffer.view(-1)), _synchronizer(me)))
                     for place in places]  # fmt: skip
        else:
            shard = [flat[begin:end] for flat, (begin, end) in zip(full, begins, strict=True)]
            grads = [(place.param, pending_grad(place.view(full[place.bucket]), _settler(me, place.bucket)))
                     for place in places]  # fmt: skip
        self._layout = Layout(buckets, places, full, shard)
        self._homes = [(place.param, place.param.data_ptr()) for place in places] if sharded else []
        self._stand_ins = grads
        managed = set(self._managed)
        self._expected = [(param, stand_in) for param, stand_in in grads if param in managed]
        own = [] if _ddp.tracks_unused(self._model) else grads
        self._scheduler.set_layout(list(zip(shard, full, strict=True)), own)
        if sharded:
            merge = not _ddp.tracks_unused(self._model)
            self._group_of = {p: i for i, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
            self._set_segments(former, merge)
        if self._compression is not None:
            self._scheduler.set_relays(self._compression.relays(buckets, full))
        self._agree_on_order()
        self._regroup()
        self._scheduler.submit_all()

    def _apply_all_before_new_layout(self) -> None:
        if self._layout is not None and self._mode == "replicated":
            for index in list(self._to_update):
                self._apply(index)

    def _set_segments(self, full: _state.FullState, merge: bool) -> None:
        assert self._layout is not None

        def kind(param: torch.nn.Parameter) -> Any:
            return _state.kind(full.get(param, {})) if merge else id(param)

        self._sharded.segments = cut_segments(self._layout, self._world, self._rank, self._group_of, kind)
        self._sharded.state = defaultdict(dict, _state.scatter(full, self._sharded.segments))
        self._optimizer.state = defaultdict(dict)

    def _agree_on_order(self) -> None:
        """Rank 0's forward order becomes everyone's: all ranks must queue the same all-gathers."""
        index = {param: i for i, param in enumerate(self._params)}
        seen = sorted(self._watch.order.items(), key=lambda item: item[1]) if self._watch else []
        order = [[index[param] for param, _ in seen if param in index]]
        dist.broadcast_object_list(order, src=dist.get_global_rank(self._group, 0), group=self._group)
        self._position = {self._params[i]: place for place, i in enumerate(order[0])}

    def _regroup(self) -> None:
        assert self._layout is not None
        if self._compression is not None:
            sizes = [1] * len(self._layout.full)
        else:
            sizes = fuse([flat.nbytes for flat in self._layout.full], self._group_bytes)
        self._layout.fuse(sizes)
        members = [[place.param for place in places] for places in self._layout.groups]
        self._segments = [[] for _ in sizes]
        for segment in self._sharded.segments:
            self._segments[self._layout.group_of_bucket[segment.bucket]].append(segment)
        self._order = gather_order(members, self._position)
        self._scheduler.set_groups(sizes, self._order)
        group_of = {param: index for index, params in enumerate(members) for param in params}
        self._hooks.set_waits(self._watch.reads if self._watch else {}, group_of, self._order)

    # --- forward ---

    def before_forward(self) -> None:
        """Called before every forward of the DDP module."""
        if self._scheduler.has_gradients():  # a backward whose gradients no step has used: they are added to
            self._scheduler.synchronize()
            self._unclaimed()
        if not torch.is_grad_enabled():
            self.synchronize()
            return
        self._note_local_pass()
        self._bring_home()
        if self._watch is None:
            self.synchronize()
            self._watch = ForwardWatch(self._model.module, self._params)

    def after_forward(self, failed: bool) -> None:
        """Called after every forward of the DDP module, also after one that ``failed``."""
        if self._watch is not None:
            self._watch.close()
            if not self._watch.complete and self._layout is None:
                self._watch = None  # it failed on the way: the next one shall tell
        # Groups that no module has asked for in this pass (a branch not taken): backward may write to their buckets.
        if not failed and (self._to_update or self._scheduler.gathering()):
            self.synchronize()

    def settle(self, groups: list[int]) -> None:
        """Finishes these fusion groups: waits, and applies what step() left to do."""
        self._judge()
        for index in groups:
            self._scheduler.wait_gathered(index)
            self._apply(index)

    _homes: list[tuple[torch.nn.Parameter, int]] = []  # noqa: RUF012 - replaced, never changed

    def _bring_home(self) -> None:
        """Somebody gave parameters another storage (flatten_parameters, param.data = ...): take over the values."""
        moved = {param for param, home in self._homes if param.data_ptr() != home}
        if not moved:
            return
        assert self._layout is not None
        self.synchronize()
        for place in self._layout.places:
            full = self._layout.full[place.bucket]
            if place.param in moved and (place.param.dtype, place.param.device) != (full.dtype, full.device):
                raise RuntimeError(
                    f"A parameter was changed from {full.dtype} on {full.device} to {place.param.dtype} on "
                    f"{place.param.device} under dear.attach(): call engine.detach(), convert, wrap and attach again."
                )
        rehome([place for place in self._layout.places if place.param in moved], self._layout.full)
        self._homes = [(param, param.data_ptr()) for param, _ in self._homes]

    _before_local: list[int] | None = None  # replicated: versions of the averages before a pass that is not reduced

    def _note_local_pass(self) -> None:
        """A pass under no_sync() after one that was reduced would add a local gradient to an average."""
        self._before_local = None
        if self._mode == "sharded" or self._layout is None or self._model.require_backward_grad_sync:
            return
        if self._scheduler.has_gradients() and _grads.look(self._expected, self._unused) != "none":
            self._before_local = [flat._version for flat in self._layout.full]

    def _check_untouched(self) -> None:
        self._scheduler.check_untouched()
        if self._before_local is None:
            return
        assert self._layout is not None
        if self._before_local != [flat._version for flat in self._layout.full]:
            raise RuntimeError(
                "Gradients were written to after the backward pass that sent them: the last backward pass before "
                "optimizer.step() must be the one outside model.no_sync()."
            )


def _settler(engine: weakref.ref[Schedule], bucket: int) -> Callable[[], None]:
    def settle() -> None:
        alive = engine()
        if alive is not None and alive._layout is not None:
            alive.settle([alive._layout.group_of_bucket[bucket]])

    return settle


def _finisher(engine: weakref.ref[Schedule]) -> Callable[[], None]:
    def finish() -> None:
        alive = engine()
        if alive is not None:
            alive.synchronize()

    return finish


def _synchronizer(engine: weakref.ref[Schedule]) -> Callable[[], None]:
    def synchronize() -> None:
        alive = engine()
        if alive is not None:
            alive._scheduler.synchronize()

    return synchronize
