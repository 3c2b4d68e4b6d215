"""``dear.attach``: the DeAR schedule for a DistributedDataParallel module and its optimizer.

Note [The life of a gradient]
 1. backward: DDP fills a bucket; the native hook reduce-scatters each fusion group as its last bucket comes.
 2. step(): sharded - this rank updates the parameters it owns, group by group, and gathers each group at once, in
    forward order; replicated - the gathers of averaged gradients are under way already, and the hyper-parameters are
    noted for updates that happen when each group has come.
 3. forward: each module waits for its own groups only.
The first two backward passes bring new bucket layouts, since DDP rebuilds its buckets once; for these the layout is
adopted at the end of backward, and everything moves then.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import types
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer
from torch.optim import optimizer as _everyones

from dear import _C, _ddp, _grads, _state
from dear._fusion import MIB, ddp_bucket_bytes, default_group_bytes, fuse, gather_order
from dear._hooks import ModelHooks
from dear._layout import Layout, Segment, cut_segments, read_places, rehome
from dear._observe import ForwardWatch
from dear._stand_in import PendingGrad, local_grad, pending_grad
from dear._update import PER_PARAMETER, ReplicatedUpdate, ShardedUpdate, choose_mode
from dear.collectives import choose_algorithm, group_timeout, make_lane, shard_range


def attach(
    model: DDP,
    optimizer: Optimizer,
    *,
    update: str = "auto",
    bucket_cap_mb: float | Literal["auto"] = "auto",
    overlap_forward: bool = True,
    process_group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Engine:
    """Puts the DeAR schedule under a DDP module and its optimizer; the training loop stays as it is.

    Every rank of the module's process group must call it alike. The optimizer's ``step`` and the module's parameters
    are taken over until :meth:`Engine.detach`.

    Args:
        model: the DDP module as built, without a communication hook.
        optimizer: any torch optimizer over its parameters.
        update: ``"sharded"``: each rank updates its shard of the parameters between the halves, and the updated
            parameters are gathered (optimizer state and work divided by the world size; for elementwise optimizers).
            ``"replicated"``: averaged gradients are gathered and every rank updates everything, each layer when its
            gradients have come. ``"auto"``: sharded where the optimizer is known to be elementwise.
        bucket_cap_mb: size of a fusion group in MiB of gradients; ``"auto"`` takes a sixteenth of the model's, from 1
            to 25. Smaller groups overlap better, larger ones cost fewer messages. Where DDP's own buckets are
            larger, DDP is made to bucket finer.
        overlap_forward: False waits for the all-gathers in ``step()``: a drop-in for code that reads parameters
            right after it.
        process_group: must have the ranks of the module's own group, which is the default.
        algorithm: ``"ring"``, ``"native"`` or None to choose by backend; see :mod:`dear.collectives`.

    Returns:
        The :class:`Engine`, also a context manager that detaches at its end.

    Raises:
        TypeError, ValueError, RuntimeError: something cannot work (see the README's list); one sentence says what
            and what to do, and nothing has been changed.

    Source: Zhang et al., "Decoupling the All-Reduce Primitive for Accelerating Distributed Deep Learning", 2023;
    sharded update: Rajbhandari et al., "ZeRO", 2020, stage 1.
    """
    _ddp.check(model, optimizer, process_group)
    mode = choose_mode(optimizer, update)
    if bucket_cap_mb == "auto":
        trained = sum(param.nbytes for param in model.module.parameters() if param.requires_grad)
        bucket_cap_mb = default_group_bytes(trained) / MIB
    _check_cap(bucket_cap_mb)
    group = process_group if process_group is not None else model.process_group
    device = next(param.device for param in model.module.parameters() if param.requires_grad)
    chosen = choose_algorithm(group, device, algorithm)
    _agree(group, {"update": mode, "bucket_cap_mb": bucket_cap_mb, "algorithm": chosen,
                   "optimizer": type(optimizer).__name__, "overlap_forward": overlap_forward})  # fmt: skip
    return Engine(model, optimizer, mode, bucket_cap_mb, overlap_forward, group, chosen, device)


def _check_cap(value: Any) -> None:
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f'bucket_cap_mb must be "auto" or a positive number of MiB, not {value!r}.')


def _agree(group: dist.ProcessGroup, options: dict[str, Any]) -> None:
    everyone: list[dict[str, Any]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, options, group=group)
    for name in options:
        for rank, other in enumerate(everyone):
            if other[name] != everyone[0][name]:
                raise ValueError(
                    f"Ranks 0 and {rank} disagree on {name} ({everyone[0][name]!r} and {other[name]!r}): every rank "
                    "must call dear.attach() with the same arguments."
                )


class Engine:
    """The schedule at work. Made by :func:`attach`. Not thread-safe: use it from the training thread."""

    def __init__(
        self,
        model: DDP,
        optimizer: Optimizer,
        mode: str,
        bucket_cap_mb: float,
        overlap_forward: bool,
        group: dist.ProcessGroup,
        algorithm: str,
        device: torch.device,
    ) -> None:
        self._model, self._optimizer, self._group = model, optimizer, group
        self._mode = mode
        self._overlap = overlap_forward
        self._group_bytes = int(bucket_cap_mb * MIB)
        self._params = [param for param in model.module.parameters() if param.requires_grad]
        self._managed = [param for g in optimizer.param_groups for param in g["params"]]
        self._rank, self._world = group.rank(), group.size()
        self._layout: Layout | None = None
        self._watch: ForwardWatch | None = None
        self._order: list[int] = []
        self._members: list[list[torch.nn.Parameter]] = []  # parameters by fusion group
        self._segments: list[list[Segment]] = []  # by fusion group
        self._to_update: set[int] = set()  # replicated: groups whose update is still to come
        self._steps = 0
        self._last_waits = (0, 0)
        self._detached = False

        timeout = group_timeout(group, device)
        self._gather_lane = make_lane(group, "all-gather", algorithm, timeout)  # type: ignore[arg-type]
        reduce_lane = make_lane(group, "reduce-scatter", algorithm, timeout)  # type: ignore[arg-type]
        self._scheduler = _C.Scheduler(reduce_lane, self._gather_lane, mode == "replicated")
        # The scheduler must not keep the engine alive: it is owned by the reducer, the reducer by the model.
        me = weakref.ref(self)
        self._scheduler.set_backward_ended(lambda new: me()._backward_ended(new), _ddp.tracks_unused(model))  # type: ignore[union-attr]

        self._reducer_options = _ddp.reducer_options(model)
        cap = min(self._reducer_options.cap, ddp_bucket_bytes(self._group_bytes))
        first = min(self._reducer_options.first, cap)
        # Local gradients stay in the buckets when nobody else may read them: a copy less.
        views = self._reducer_options.views or mode == "sharded"
        _ddp.rebuild_reducer(model, _ddp.ReducerOptions(cap, first, views))
        self._reducer_params = _ddp.reducer_parameters(model)
        self._hook_calls = _ddp.register(model, self._scheduler)

        self._original_step = optimizer.step
        self._sharded = ShardedUpdate(optimizer, self._original_step)
        self._replicated = ReplicatedUpdate(optimizer, self._original_step)
        self._install_step()
        self._hooks = ModelHooks(model, self._scheduler, self)
        self._hooks.install(optimizer, sharded=mode == "sharded")
        setattr(model, _ddp.ENGINE, self)
        setattr(optimizer, _ddp.ENGINE, self)
        self._at_exit = functools.partial(_finish_at_exit, me)
        atexit.register(self._at_exit)

    # --- public ---

    @property
    def update(self) -> str:
        """``"sharded"`` or ``"replicated"``."""
        return self._mode

    @property
    def bucket_cap_mb(self) -> float:
        """Size of a fusion group in MiB. Set it between steps, on every rank alike; DDP's buckets stay as they are."""
        return self._group_bytes / MIB

    @bucket_cap_mb.setter
    def bucket_cap_mb(self, value: float) -> None:
        _check_cap(value)
        if self._scheduler.has_gradients():
            raise RuntimeError("bucket_cap_mb can be changed between steps only: call optimizer.step() first.")
        self.synchronize()
        self._group_bytes = int(value * MIB)
        if self._layout is not None:
            self._regroup()

    def synchronize(self) -> None:
        """Waits until nothing is in flight and every parameter is finished.

        Raises:
            RuntimeError: a peer has died or stalled; names the rank, the phase and the fusion group.
        """
        self._scheduler.synchronize()
        for index in list(self._order):
            self._apply(index)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clips the averaged gradients as ``torch.nn.utils.clip_grad_norm_`` does for plain DDP; returns the norm.

        Every rank must call it, after backward and before ``step()``. It waits for the reduce-scatters.

        Raises:
            RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set (no gradient has been changed).
        """
        if self._mode == "replicated":
            self._finish_gradients()
            return torch.nn.utils.clip_grad_norm_(self._managed, max_norm, norm_type, error_if_nonfinite)
        self._scheduler.synchronize()
        norm_type = float(norm_type)
        grads = [grad for segment in self._active_segments() if (grad := segment.tensor.grad) is not None]
        each = list(torch._foreach_norm(grads, norm_type)) if grads else []
        norms = self._everyones_norms(torch.stack([norm.float() for norm in each]).norm(norm_type) if each else None)
        total = torch.linalg.vector_norm(norms, norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is not finite, so they cannot be clipped: look "
                "for the cause, or pass error_if_nonfinite=False."
            )
        if grads:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (total + 1e-6), max=1.0))
        return total

    def _everyones_norms(self, own: torch.Tensor | None) -> torch.Tensor:
        """One number of every rank, in the all-gather lane, so that a missing peer is named as everywhere."""
        norms = torch.zeros(self._world, device=self._params[0].device)
        mine = norms[self._rank : self._rank + 1]
        if own is not None:
            mine.copy_(own)
        self._gather_lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(norms, mine)], "the gradient norm").wait()
        return norms

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's full state, as ``optimizer.state_dict()`` of plain DDP would give it, under ``"optimizer"``.

        With ``update="sharded"`` every rank must call it; each gets all of it.
        """
        self.synchronize()
        if self._mode == "replicated":
            return {"optimizer": self._optimizer.state_dict()}
        with self._full_state():
            return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` or a plain optimizer gave, at any world size.

        Raises:
            KeyError: it is not such a dict.
        """
        if "optimizer" not in state_dict:
            raise KeyError('An engine\'s state has the key "optimizer": pass what engine.state_dict() returned.')
        self._optimizer.load_state_dict(state_dict["optimizer"])

    def stats(self) -> dict[str, Any]:
        """Counters: ``steps``; ``bytes_sent`` by this rank in all; of the last step, how many ms the training thread
        waited for communication (``exposed_ms``, and by phase); the fusion plan."""
        reduce_ns, gather_ns = self._last_waits
        return {
            "steps": self._steps,
            "bytes_sent": self._scheduler.bytes_sent(),
            "exposed_ms": (reduce_ns + gather_ns) / 1e6,
            "wait_reduce_scatter_ms": reduce_ns / 1e6,
            "wait_all_gather_ms": gather_ns / 1e6,
            "fusion_groups": len(self._members),
            "update": self._mode,
            "optimizer_state_bytes": self._state_bytes(),
        }

    def start_trace(self) -> None:
        """Begins to note when each exchange, update and wait began and ended."""
        self._scheduler.start_trace()

    def stop_trace(self) -> list[dict[str, Any]]:
        """What was noted: dicts of ``lane`` ("reduce-scatter", "all-gather", "update", "wait"), ``name``, ``start``
        and ``end`` (ns of ``time.perf_counter_ns()``)."""
        self.synchronize()
        events = self._scheduler.stop_trace()
        return [{"lane": e.lane, "name": e.name, "start": e.start_ns, "end": e.end_ns} for e in events]

    def detach(self) -> None:
        """Gives model and optimizer back to plain DDP, with finished parameters and full optimizer state.

        Every rank must call it. The optimizer's state can then be saved and training goes on without this library.
        """
        if self._detached:
            return
        self.synchronize()
        grads = self._averaged_gradients()
        if self._mode == "sharded" and self._layout is not None:
            self._optimizer.state = self._gathered_state()
            for place in self._layout.places:
                place.param.data = place.param.detach().clone(memory_format=torch.preserve_format)
        self._release()
        for param in self._params:
            param.grad = grads.get(param)
        _ddp.rebuild_reducer(self._model, self._reducer_options)

    def _averaged_gradients(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The gradients that a backward pass has left and no step has used, as plain DDP would have them in .grad."""
        if self._layout is None or not self._scheduler.has_gradients():
            return {}
        flats = self._layout.full
        if self._mode == "sharded":
            flats = [torch.empty_like(flat) for flat in flats]
            for flat, shard in zip(flats, self._layout.shard, strict=True):
                begin, end = shard_range(flat.numel(), self._world, self._rank)
                flat[begin:end] = shard
                part = [(flat, flat[begin:end])]
                self._gather_lane.submit(_C.Phase.all_gather, _C.Reduction.sum, part, "the gradients").wait()
        found = [place for place in self._layout.places if place.param.grad is not None]
        return {place.param: place.view(flats[place.bucket]).clone() for place in found}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.detach()
        else:  # the peers may not follow: let go without another collective
            self._scheduler.abort(f"Rank {self._rank} left the engine's context with {kind.__name__}.")
            self._release()

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
        sizes = fuse([flat.nbytes for flat in self._layout.full], self._group_bytes)
        self._group_of_bucket = [group for group, size in enumerate(sizes) for _ in range(size)]
        self._members = [[] for _ in sizes]
        for place in self._layout.places:
            self._members[self._group_of_bucket[place.bucket]].append(place.param)
        self._segments = [[] for _ in sizes]
        for segment in self._sharded.segments:
            self._segments[self._group_of_bucket[segment.bucket]].append(segment)
        self._order = gather_order(self._members, self._position)
        self._scheduler.set_groups(sizes, self._order)
        group_of = {param: index for index, members in enumerate(self._members) for param in members}
        self._hooks.set_waits(self._watch.reads if self._watch else {}, group_of, self._order)

    # --- forward ---

    def before_forward(self) -> None:
        """Called before every forward of the DDP module."""
        if self._scheduler.has_gradients():  # a backward whose gradients no step has used: they are added to
            self._scheduler.synchronize()
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

    # --- the step ---

    def _install_step(self) -> None:
        step = self._original_step
        me = weakref.ref(self)

        @functools.wraps(step)
        def dear_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            engine = me()
            assert engine is not None
            return engine._step(closure)

        self._optimizer.step = types.MethodType(dear_step, self._optimizer)  # type: ignore[method-assign]

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if not self._same_params():
            raise RuntimeError(
                "The optimizer's parameters have changed since dear.attach(): detach, change them, and attach again."
            )
        if self._mode == "replicated" and not self._defers():
            return self._step_at_once(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._scheduler.has_gradients():
            _grads.refuse_unreduced(self._managed)
            return loss
        self._check_untouched()
        found = _grads.look(self._expected, self._unused)
        if found == "none":  # zero_grad() came first: there is nothing to do, as in plain torch
            self._scheduler.gradients_used()
            return loss
        if self._mode == "sharded":
            if found == "changed":
                _grads.refuse_changes()
            self._bring_home()
            self._step_sharded()
        elif found == "changed":  # what the user has put there counts
            self._finish_gradients()
            self._original_step()
        else:
            self._replicated.capture()
            self._to_update = set(self._order)
        self._scheduler.gradients_used()
        if not self._overlap:
            self.synchronize()
        self._count_step()
        return loss

    def _same_params(self) -> bool:
        now = [p for g in self._optimizer.param_groups for p in g["params"]]
        return len(now) == len(self._managed) and all(a is b for a, b in zip(now, self._managed, strict=True))

    def _has_step_hooks(self) -> bool:
        own = self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks
        return bool(own or _everyones._global_optimizer_pre_hooks or _everyones._global_optimizer_post_hooks)

    def _defers(self) -> bool:
        return type(self._optimizer) in PER_PARAMETER and not self._has_step_hooks()

    def _step_sharded(self) -> None:
        scheduler = self._scheduler
        if self._has_step_hooks():  # they expect one call for everything
            scheduler.synchronize()
            self._run_sharded(range(len(self._segments)), "all groups")
            for index in self._order:
                scheduler.submit_gather(index)
            return
        updated: set[int] = set()
        for index in self._order:
            # While the next group to be gathered is still being reduced, update one that is not.
            while index not in updated and not scheduler.reduced(index):
                ready = next((i for i in self._order if i not in updated and scheduler.reduced(i)), None)
                if ready is None:
                    break
                self._update_group(ready, updated)
            if index not in updated:
                self._update_group(index, updated)
            scheduler.submit_gather(index)

    def _update_group(self, index: int, updated: set[int]) -> None:
        self._scheduler.wait_reduced(index)
        self._run_sharded([index], f"fusion group {index}")
        updated.add(index)

    def _run_sharded(self, groups: Any, name: str) -> None:
        start = _C.now_ns()
        segments = [segment for index in groups for segment in self._segments[index]]
        self._sharded.run([segment for segment in segments if segment.places[0].param not in self._unused])
        self._scheduler.trace("update", name, start, _C.now_ns())

    def _active_segments(self) -> list[Segment]:
        return [s for s in self._sharded.segments if s.places[0].param not in self._unused]

    def _apply(self, index: int) -> None:
        """Replicated: the update of one fusion group, once, when its gradients have come."""
        if index not in self._to_update:
            return
        assert self._layout is not None
        self._scheduler.wait_gathered(index)
        self._to_update.discard(index)
        start = _C.now_ns()
        self._replicated.run(self._grads_of(index))
        self._scheduler.trace("update", f"fusion group {index}", start, _C.now_ns())

    def _grads_of(self, index: int) -> dict[torch.nn.Parameter, torch.Tensor]:
        assert self._layout is not None
        return {
            place.param: place.view(self._layout.full[place.bucket])
            for place in self._layout.places
            if self._group_of_bucket[place.bucket] == index and place.param not in self._unused
        }

    def _finish_gradients(self) -> None:
        """Replicated: .grad of every used parameter is the averaged gradient, as a plain tensor."""
        self._scheduler.synchronize()
        for index in self._order:
            for param, grad in self._grads_of(index).items():
                if isinstance(param.grad, PendingGrad):
                    param.grad = grad

    def _step_at_once(self, closure: Callable[[], Any] | None) -> Any:
        """For optimizers whose update of one parameter may depend on others, or that evaluate the closure again."""

        def finish() -> None:
            if self._scheduler.has_gradients():
                self._check_untouched()
                self._finish_gradients()
                self._scheduler.gradients_used()
            elif self._layout is None or _grads.look(self._expected, self._unused) == "changed":
                _grads.refuse_unreduced(self._managed)

        def finished() -> Any:
            assert closure is not None
            loss = closure()
            finish()
            return loss

        if closure is None:
            finish()
        result = self._original_step(finished if closure is not None else None)
        self._count_step()
        return result

    def _count_step(self) -> None:
        self._steps += 1
        self._last_waits = self._scheduler.take_wait_times()

    # --- optimizer state ---

    def _gathered_state(self) -> Any:
        assert self._layout is not None
        full = _state.gather(self._sharded.state, self._sharded.segments, self._layout, self._gather_lane, self._group)
        return defaultdict(dict, full)

    def _plain_state(self) -> Any:  # torch says that its keys are any tensors
        return dict(self._optimizer.state)

    @contextlib.contextmanager
    def _full_state(self) -> Any:
        full = self._gathered_state() if self._layout is not None else self._optimizer.state
        kept, self._optimizer.state = self._optimizer.state, full
        self._hooks.exporting = True
        try:
            yield
        finally:
            self._optimizer.state = kept
            self._hooks.exporting = False

    def state_was_loaded(self) -> None:
        """The optimizer has just loaded a full state: keep this rank's part of it."""
        if self._mode == "sharded" and self._layout is not None:
            self._set_segments(self._plain_state(), not _ddp.tracks_unused(self._model))
            self._regroup()

    def _state_bytes(self) -> int:
        state = self._sharded.state if self._mode == "sharded" and self._layout else self._optimizer.state
        return sum(v.nbytes for values in state.values() for v in values.values() if isinstance(v, torch.Tensor))

    # --- the end ---

    def _release(self) -> None:
        self._detached = True
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        self._scheduler.clear_backward_ended()
        self._optimizer.step = self._original_step  # type: ignore[method-assign]
        for owner in (self._model, self._optimizer):
            delattr(owner, _ddp.ENGINE)


def _settler(engine: weakref.ref[Engine], bucket: int) -> Callable[[], None]:
    def settle() -> None:
        alive = engine()
        if alive is not None:
            alive.settle([alive._group_of_bucket[bucket]])

    return settle


def _synchronizer(engine: weakref.ref[Engine]) -> Callable[[], None]:
    def synchronize() -> None:
        alive = engine()
        if alive is not None:
            alive._scheduler.synchronize()

    return synchronize


def _finish_at_exit(engine: weakref.ref[Engine]) -> None:
    """A script may end right after step(): its peers still want the last all-gather."""
    alive = engine()
    if alive is not None and not alive._detached:
        with contextlib.suppress(Exception):
            alive.synchronize()
