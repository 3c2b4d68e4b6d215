"""The engine: the optimizer's step on the schedule, and what a training script may call.

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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer
from torch.optim import optimizer as _everyones

from dear import _C, _ddp, _grads
from dear._fusion import MIB, check_cap
from dear._layout import Segment
from dear._schedule import Schedule
from dear._stand_in import PendingGrad
from dear._update import PER_PARAMETER
from dear.collectives import shard_range

if TYPE_CHECKING:
    from compress import Compressor


class Engine(Schedule):
    """The schedule at work. Made by :func:`dear.attach`. Not thread-safe: use it from the training thread."""

    def __init__(self, model: DDP, optimizer: Optimizer, mode: str, overlap_forward: bool, **options: Any) -> None:
        super().__init__(model, optimizer, mode, **options)
        self._overlap = overlap_forward
        self._steps = 0
        self._last_waits = (0, 0)
        self._detached = False
        self._install_step()
        setattr(model, _ddp.ENGINE, self)
        setattr(optimizer, _ddp.ENGINE, self)
        self._at_exit = functools.partial(_finish_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    # --- public ---

    @property
    def bucket_cap_mb(self) -> float:
        """Size of a fusion group in MiB. Set it between steps, on every rank alike; DDP's buckets stay as they are."""
        return self._group_bytes / MIB

    @bucket_cap_mb.setter
    def bucket_cap_mb(self, value: float) -> None:
        check_cap(value)
        if self._compression is not None:
            raise RuntimeError(
                "With a compressor the fusion groups are DDP's buckets: detach, and attach with another bucket_cap_mb."
            )
        if self._scheduler.has_gradients():
            raise RuntimeError("bucket_cap_mb can be changed between steps only: call optimizer.step() first.")
        self.synchronize()
        self._group_bytes = int(value * MIB)
        if self._layout is not None:
            self._regroup()

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that train together."""
        return self._group

    @property
    def compressor(self) -> Compressor | None:
        """What ``attach`` was given."""
        return None if self._compression is None else self._compression.compressor

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self._params[0].device

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

        With a compressor, all ranks' states of it stand under ``"compressor"``. With it, or with
        ``update="sharded"``, every rank must call this; each gets all of it.
        """
        self.synchronize()
        if self._compression is not None:
            compressor = self._compression.compressor.state_dict(gather=True)
            return {"optimizer": self._optimizer.state_dict(), "compressor": compressor}
        if self._mode == "replicated":
            return {"optimizer": self._optimizer.state_dict()}
        with self._full_state():
            return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` or a plain optimizer gave, at any world size.

        Raises:
            KeyError: it is not such a dict.
            ValueError: the compressor's state in it is of another kind, or of another model.
        """
        if "optimizer" not in state_dict:
            raise KeyError('An engine\'s state has the key "optimizer": pass what engine.state_dict() returned.')
        if self._compression is not None and "compressor" in state_dict:
            self._compression.compressor.load_state_dict(state_dict["compressor"])
        self._optimizer.load_state_dict(state_dict["optimizer"])

    def stats(self) -> dict[str, Any]:
        """Counters: ``steps``; ``bytes_sent`` by this rank in all; of the last step, how many ms the training thread
        waited for communication (``exposed_ms``, and by phase; with NCCL none, since streams wait in its place); the
        fusion plan; for host tensors, what a compressor computed in the step before (``encode_ms``, ``merge_ms``,
        ``decode_ms``)."""
        reduce_ns, gather_ns = self._last_waits
        return {
            "steps": self._steps,
            "bytes_sent": self._scheduler.bytes_sent(),
            "exposed_ms": (reduce_ns + gather_ns) / 1e6,
            "wait_reduce_scatter_ms": reduce_ns / 1e6,
            "wait_all_gather_ms": gather_ns / 1e6,
            "fusion_groups": len(self._order),
            "update": self._mode,
            "optimizer_state_bytes": self._state_bytes(),
            **(self._compression.stats_of_last_step() if self._compression is not None else {}),
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

        Raises:
            RuntimeError: gradients that no step has used are not finite, and the compressor has ``nonfinite="raise"``;
                nothing has been changed, and detaching again leaves them as they are.
        """
        if self._detached:
            return
        self.synchronize()
        if self._scheduler.has_gradients():
            self._unclaimed()
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
        self._judge()
        found = _grads.look(self._expected, self._unused)
        if found == "none":  # zero_grad() came first: there is nothing to do, as in plain torch
            self._unclaimed()
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

    def _finish_gradients(self) -> None:
        """Replicated: .grad of every used parameter is the averaged gradient, as a plain tensor."""
        self._judge()
        self._scheduler.synchronize()
        for index in self._order:
            self._arrived(index)
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

    def _state_bytes(self) -> int:
        state = self._sharded.state if self._mode == "sharded" and self._layout else self._optimizer.state
        return sum(v.nbytes for values in state.values() for v in values.values() if isinstance(v, torch.Tensor))

    # --- the end ---

    def _release(self) -> None:
        self._detached = True
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        self._scheduler.clear_backward_ended()
        if self._compression is not None:
            self._compression.release()
        self._optimizer.step = self._original_step  # type: ignore[method-assign]
        for owner in (self._model, self._optimizer):
            delattr(owner, _ddp.ENGINE)


def _finish_at_exit(engine: weakref.ref[Engine]) -> None:
    """A script may end right after step(): its peers still want the last all-gather."""
    alive = engine()
    if alive is not None and not alive._detached:
        with contextlib.suppress(Exception):
            alive.synchronize()
