"""The engine: what a training script may call, on top of a schedule and an update strategy."""

from __future__ import annotations

import atexit
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dear import _ddp, _grads
from dear._attached import Attached
from dear._context import StepContext, ordinary
from dear._fusion import MIB, check_cap
from dear._hooks import Hooks
from dear._replicas import check_replicas
from dear._schedule import Schedule
from dear._update import Update
from dear.compression import Compressor


class Engine:
    """The schedule at work. Made by :func:`dear.attach`. Not thread-safe: use it from the training thread."""

    def __init__(
        self, attached: Attached, schedule: Schedule, update: Update, *, overlap_forward: bool, check_replicas: int
    ) -> None:
        self._attached, self._schedule, self._update = attached, schedule, update
        self._overlap, self._check_replicas = overlap_forward, check_replicas
        self._steps = 0
        self._last_waits = (0, 0)
        self._detached = False
        self._hooks = Hooks(attached.model)
        self._hooks.install(
            attached.user.optimizer,
            before_forward=schedule.before_forward,
            after_forward=schedule.after_forward,
            before_export=self._before_export,
            before_load=self.synchronize,
            after_load=update.state_was_loaded,
        )
        attached.user.take_over(self._step, update.zeroed)
        setattr(attached.model, _ddp.ENGINE, self)
        setattr(attached.user.optimizer, _ddp.ENGINE, self)
        self._at_exit = functools.partial(_finish_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    # --- what it is ---

    @property
    def update(self) -> str:
        """``"sharded"`` or ``"replicated"``."""
        return self._update.kind

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that train together."""
        return self._attached.group

    @property
    def compressor(self) -> Compressor | None:
        """What ``attach`` was given."""
        return self._attached.compression.compressor

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self._attached.device

    @property
    def bucket_cap_mb(self) -> float:
        """Size of a fusion group in MiB. Set it between steps, on every rank alike; DDP's buckets stay as they are."""
        return self._schedule.group_bytes / MIB

    @bucket_cap_mb.setter
    def bucket_cap_mb(self, value: float) -> None:
        check_cap(value)
        if self.compressor is not None:
            raise RuntimeError(
                "With a compressor the fusion groups are DDP's buckets: detach, and attach with another bucket_cap_mb."
            )
        if self._attached.scheduler.has_gradients():
            raise RuntimeError("bucket_cap_mb can be changed between steps only: call optimizer.step() first.")
        self.synchronize()
        self._schedule.group_bytes = int(value * MIB)

    # --- the step ---

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """What ``optimizer.step`` does."""
        return self._attached.user.with_hooks(self._step_between_hooks, closure, self.synchronize)

    def _step_between_hooks(self, closure: Callable[[], Any] | None) -> Any:
        self._schedule.look_again()
        called, loss = self._update.step_with_closure(closure)
        if not called:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if not self._step_with_gradients():
                return loss
        self._steps += 1
        self._last_waits = self._attached.scheduler.take_wait_times()
        if self._check_replicas and self._steps % self._check_replicas == 0:
            check_replicas(self._attached, self._steps)
        return loss

    def _step_with_gradients(self) -> bool:
        """One step with what stands in ``.grad``; False where nothing does, and so nothing is to be done."""
        attached, scheduler = self._attached, self._attached.scheduler
        if attached.layout is None:
            found = _grads.look_without_layout(attached.user.params)
        else:
            if scheduler.has_gradients():
                attached.compression.validate()  # which may take the gradients away
            found = _grads.look(attached.expected())
        if found.nothing:  # zero_grad() came first: there is nothing to do, as in plain torch
            if scheduler.has_gradients():
                scheduler.synchronize()
                self._schedule.unclaimed()
                scheduler.gradients_used()
            return False
        attached.check_reduced()
        self._update.step(found)
        scheduler.gradients_used()
        if not self._overlap:
            self.synchronize()
        return True

    def synchronize(self) -> None:
        """Waits until nothing is in flight and every parameter is finished.

        Raises:
            RuntimeError: a peer has died or stalled; names the rank, the phase and the fusion group.
        """
        self._attached.synchronize()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clips the averaged gradients as ``torch.nn.utils.clip_grad_norm_`` does for plain DDP; returns the norm.

        Every rank must call it, after backward and before ``step()``. It waits for the reduce-scatters.

        Raises:
            RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set (no gradient has been changed).
        """
        return self._update.clip_grad_norm_(max_norm, float(norm_type), error_if_nonfinite)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's full state, as ``optimizer.state_dict()`` of plain DDP would give it, under ``"optimizer"``.

        Under ``"bucket_order"`` stand the names of the parameters in the order of the buckets, by which a run that goes
        on with this state sums as this one does. With a compressor, all ranks' states of it stand under
        ``"compressor"``. With it, or with
        ``update="sharded"``, every rank must call this; each gets all of it.
        """
        self.synchronize()
        state: dict[str, Any] = {"bucket_order": self._schedule.bucket_order()}
        if self.compressor is not None:
            state["compressor"] = self.compressor.state_dict(gather=True)
        with self._update.full_state():
            state["optimizer"] = self._attached.user.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` or a plain optimizer gave, at any world size. Every rank must call it alike.

        Raises:
            KeyError: it is not such a dict.
            ValueError: the compressor's state in it is of another kind, or of another model.
        """
        if "optimizer" not in state_dict:
            raise KeyError('An engine\'s state has the key "optimizer": pass what engine.state_dict() returned.')
        if self.compressor is not None and "compressor" in state_dict:
            self.compressor.load_state_dict(state_dict["compressor"])
        self._attached.user.optimizer.load_state_dict(state_dict["optimizer"])
        self._schedule.load_bucket_order(list(state_dict.get("bucket_order", [])))

    def _before_export(self) -> None:
        self.synchronize()
        self._update.check_export()

    # --- looking on ---

    def stats(self) -> dict[str, Any]:
        """Counters: ``steps``; ``bytes_sent`` by this rank in all; of the last step, how many ms the training thread
        waited for communication (``exposed_ms``, and by phase; with NCCL none, since streams wait in its place); the
        fusion groups; for host tensors, what a compressor computed in the step before (``encode_ms``, ``merge_ms``,
        ``decode_ms``)."""
        reduce_ns, gather_ns = self._last_waits
        return {
            "steps": self._steps,
            "bytes_sent": self._attached.scheduler.bytes_sent(),
            "exposed_ms": (reduce_ns + gather_ns) / 1e6,
            "wait_reduce_scatter_ms": reduce_ns / 1e6,
            "wait_all_gather_ms": gather_ns / 1e6,
            "fusion_groups": len(self._attached.order),
            "update": self.update,
            "optimizer_state_bytes": self._update.state_bytes(),
            **self._attached.compression.stats_of_last_step(),
        }

    def start_trace(self) -> None:
        """Begins to note when each exchange, update and wait began and ended."""
        self._attached.scheduler.start_trace()

    def stop_trace(self) -> list[dict[str, Any]]:
        """What was noted: dicts of ``lane`` ("reduce-scatter", "all-gather", "update", "wait"), ``name``, ``start``
        and ``end`` (ns of ``time.perf_counter_ns()``)."""
        self.synchronize()
        events = self._attached.scheduler.stop_trace()
        return [{"lane": e.lane, "name": e.name, "start": e.start_ns, "end": e.end_ns} for e in events]

    # --- the end ---

    def detach(self) -> None:
        """Gives model and optimizer back to plain DDP, with finished parameters and full optimizer state.

        Every rank must call it. The optimizer's state can then be saved and training goes on without this library.

        Raises:
            RuntimeError: gradients that no step has used are not finite, and the compressor has ``nonfinite="raise"``;
                nothing has been changed, and detaching again leaves them as they are.
        """
        if self._detached:
            return
        attached = self._attached
        self.synchronize()
        if attached.scheduler.has_gradients():
            self._schedule.unclaimed()
        with ordinary(StepContext(attached.device)):
            self._show_averages()
            self._update.release()
            self._release()
            self._schedule.restore_reducer()

    def _show_averages(self) -> None:
        """``.grad`` is what plain DDP would have left there. Collective."""
        attached = self._attached
        found = _grads.look(attached.placeholders)
        averages = self._update.averaged_gradients() if found.reduced else {}
        for param, _ in attached.placeholders:
            if param not in found.own and param.grad is not None:
                param.grad = averages.get(param)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.detach()
        else:  # the peers may not follow: let go without another collective
            self._attached.scheduler.abort(
                f"Rank {self._attached.rank} left the engine's context with {kind.__name__}."
            )
            self._release()

    def _release(self) -> None:
        self._detached = True
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        self._schedule.release()
        self._attached.compression.release()
        self._attached.user.release()
        for owner in (self._attached.model, self._attached.user.optimizer):
            delattr(owner, _ddp.ENGINE)


def _finish_at_exit(engine: weakref.ref[Engine]) -> None:
    """A script may end right after step(): its peers still want the last all-gather."""
    alive = engine()
    if alive is not None and not alive._detached:
        with contextlib.suppress(Exception):
            alive.synchronize()
