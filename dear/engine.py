"""The engine: what a training script may call, on top of a schedule and an update strategy."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dear import _ddp, _engine_state, _grads
from dear._assembly import Parts
from dear._attached import Attached
from dear._context import StepContext, ordinary
from dear._counters import Counters
from dear._findings import Findings
from dear._first_pass import Watch
from dear._fusion import MIB, check_cap
from dear._held_gradients import hand_over
from dear._hooks import Hooks
from dear._replicas import check_parameters, check_replicas
from dear._summary import Summary
from dear._update import Update
from dear.collectives import begin_anew
from dear.compression import Compressor
from dear.preconditioning import Preconditioner


class Steered(Protocol):
    """What changes an engine's setting by itself: see :class:`dear.choosing.Steering`."""

    @property
    def plan(self) -> dict[str, Any] | None: ...

    def before_forward(self) -> None: ...

    def release(self) -> None: ...


class Engine:
    """The schedule at work. Made by :func:`dear.attach`. For the training thread; others may synchronize(), too."""

    def __init__(self, parts: Parts, *, overlap_forward: bool, check_replicas: int) -> None:
        self._attached, self._schedule, self._update = parts.attached, parts.schedule, parts.update
        attached = self._attached
        self._steering: Steered | None = None
        self._findings = Findings()
        self._overlap, self._check_replicas = overlap_forward, check_replicas
        self._counters = Counters()
        self._summary = Summary(self._counters)
        self._detached = False
        self._hooks = Hooks(attached.model)
        self._hooks.install(
            [user.optimizer for user in attached.users],
            before_export=lambda: _check_export(self._attached, self._update),
            before_load=self.synchronize,
            after_load=lambda number: self._update.state_was_loaded(number),
        )
        if parts.schedule.watches_forward:
            self._hooks.watch_forward(self._before_forward, lambda failed: self._schedule.after_forward(failed))
        self._steppers = [_Stepper(self, number) for number in range(len(attached.users))]
        for user, stepper in zip(attached.users, self._steppers, strict=True):
            user.take_over(stepper.step)
            setattr(user.optimizer, _ddp.ENGINE, self)
        setattr(attached.model, _ddp.ENGINE, self)
        self._at_exit = functools.partial(_finish_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    # --- what it is ---

    @property
    def update(self) -> str:
        """``"sharded"``, ``"owned"`` or ``"replicated"``; ``"ddp"`` where ``compressor="auto"`` has turned it off."""
        return self._attached.update

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that train together."""
        return self._attached.group

    @property
    def compressor(self) -> Compressor | None:
        """What ``attach`` was given."""
        return self._attached.compression.compressor

    @property
    def preconditioner(self) -> Preconditioner | None:
        """What ``attach`` was given."""
        return self._attached.preconditioning.preconditioner

    @property
    def plan(self) -> dict[str, Any] | None:
        """What ``compressor="auto"`` has chosen, as JSON can hold it, for ``compress.auto(plan=...)`` next time; None
        without it, and until it has chosen."""
        return self._steering.plan if self._steering is not None else None

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

    def _before_forward(self) -> None:
        if self._steering is not None:
            self._steering.before_forward()
        self._schedule.before_forward()

    def _step(self, number: int, closure: Callable[[], Any] | None) -> Any:
        """What ``optimizer.step`` of one of the optimizers does between its hooks."""
        self._schedule.look_again()
        called, loss = self._update.step_with_closure(closure)
        if not called:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if not self._step_with_gradients(number):
                return loss
        if number > 0:  # the first one counts
            return loss
        counters = self._counters
        counters.stepped(self._attached)
        self._summary.stepped(self._attached)
        if counters.is_due(self._check_replicas):
            check_replicas(self._attached, counters.totals.steps)
        return loss

    def _step_with_gradients(self, number: int) -> bool:
        """One step of an optimizer with what stands in ``.grad``; False where nothing does: nothing is to be done."""
        attached, scheduler = self._attached, self._attached.scheduler
        if attached.layout is None:
            found = _grads.look_without_layout(attached.users[number].params)
        else:
            if scheduler.has_gradients():
                self._update.validate()  # which may take the gradients away
            found = attached.look_at_grads(number)
        if found.nothing:  # zero_grad() came first: there is nothing to do, as in plain torch
            if scheduler.has_gradients():
                scheduler.synchronize()
                self._schedule.unclaimed()
                scheduler.gradients_used()
            return False
        attached.check_reduced(number)
        if not self._update.gathers_gradients and self._counters.is_next_due(self._check_replicas, scheduler.passes()):
            check_parameters(attached, self._counters.totals.steps)
        self._update.step(found, number)
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
        self._schedule.look_again()  # at which parameters the optimizer has
        return self._update.clip_grad_norm_(max_norm, float(norm_type), error_if_nonfinite)

    # --- state ---

    @contextlib.contextmanager
    def full_state(self) -> Iterator[None]:
        """Inside, the optimizer has its full state, as plain DDP's has, and ``optimizer.state_dict()`` and
        ``load_state_dict()`` work on any rank alone. Every rank must enter it; what is changed inside must be changed
        on every rank alike. The next ``step()`` ends it too.

        Compressors and the order of the buckets are not part of it: see ``state_dict(optimizer=False)``.
        """
        self.synchronize()
        self._update.show_full_state()
        try:
            yield
        finally:
            self._update.hide_full_state()

    def state_dict(self, optimizer: bool = True, gather: bool = True) -> dict[str, Any]:
        """The optimizer's full state, as ``optimizer.state_dict()`` of plain DDP would give it, under ``"optimizer"``;
        a list of them where ``attach`` was given several optimizers.

        Under ``"bucket_order"`` stand the names of the parameters in the order of the buckets, by which a run that goes
        on with this state sums as this one does. With a compressor, all ranks' states of it stand under
        ``"compressor"``, and a preconditioner's under ``"preconditioner"``. With one of them, or with
        ``update="sharded"`` or ``"owned"``, every rank must call this; each gets all of it. Under
        ``"tuner"`` stands what a :class:`dear.FusionTuner` has found, under ``"auto"`` what ``compressor="auto"`` has.

        optimizer: False leaves the optimizer's state out, where a framework saves it by itself.
        gather: False gives this rank's state of the compressor alone, which each rank must save then.
        """
        self.synchronize()
        chosen = not self._findings.tries()
        state = _engine_state.save(self._attached, self._schedule, compressor=chosen, gather=gather)
        state |= self._findings.state()
        if optimizer:
            state["optimizer"] = _engine_state.save_optimizers(self._attached, self._update)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, at any world size, or ``{"optimizer": state}`` with a plain optimizer's
        state. Every rank must call it alike.

        A tuner that had ended, or ``"auto"`` that had chosen, does not search again on as many ranks; at another world
        size, and where the run was saved in mid-search, the search begins again.

        Raises:
            TypeError, KeyError: it is not such a dict.
            ValueError: the compressor's state in it is of another kind, or of another model; or it is of another number
                of optimizers.
        """
        _engine_state.check(state_dict)
        chosen = self._findings.load(state_dict)  # first: it may change the parts that take the rest
        _engine_state.load(self._attached, self._schedule, state_dict, compressor=chosen)

    # --- monitoring ---

    def stats(self) -> dict[str, Any]:
        """This rank's numbers, each an int or a float by its name, as a dashboard takes them: steps, bytes, waits in
        ms, and what the update strategy, a compressor and a preconditioner count. "Monitoring" lists them with their
        units."""
        return {
            **self._counters.numbers(self._attached),
            "fusion_groups": len(self._attached.order),
            "alias_waits": self._update.alias_waits,
            **self._update.stats(),
            **self._attached.compression.stats_of_last_step(),
            **self._attached.preconditioning.stats(),
        }

    def log_every(self, steps: int) -> None:
        """Says on rank 0, every so many steps, in one line what they took, through ``logging.getLogger("dear")`` at
        level INFO; 0: never, as in the beginning. Every rank must call it, alike, between two steps.

        Raises:
            ValueError: a negative number, or ranks were given different ones; on every rank.
            RuntimeError: the engine is detached.
        """
        if self._detached:
            raise RuntimeError(
                "engine.log_every() counts steps of an engine at work, and this one is detached: call it on the engine "
                "that dear.attach() returns."
            )
        self._summary.set_every(self._attached.group, steps)

    def start_trace(self) -> None:
        """Begins to note when each exchange, update and wait began and ended."""
        self._attached.scheduler.start_trace()

    def stop_trace(self) -> list[dict[str, Any]]:
        """What was noted: dicts of ``lane`` ("reduce-scatter", "all-gather", "decode", "update", "wait"), ``name``,
        ``start`` and ``end`` (ns of ``time.perf_counter_ns()``)."""
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
        self._summary.finish()
        if attached.scheduler.has_gradients():
            self._schedule.unclaimed()
        with ordinary(StepContext(attached.device)):
            _show_averages(attached, self._update)
            self._update.release()
            self._release()
            if self._schedule.restore_reducer():
                Watch(attached.model, "engine.detach()")

    def _replace(self, make: Callable[[], Parts]) -> None:
        """Goes on with other parts, which ``make`` makes, from a step boundary on; the user's handle stays. Collective.

        What stood in ``.grad`` is plain then, and the next layout has the order of this one's buckets.
        """
        attached, order = self._attached, self._schedule.bucket_order.names()
        self.synchronize()
        self._summary.finish()
        with ordinary(StepContext(attached.device)):
            _show_averages(attached, self._update)
            self._update.release()
            self._schedule.release()
            attached.compression.release()
            attached.scheduler.release()
            self._schedule.restore_reducer()
        with ordinary(StepContext(attached.device, grad=False)):
            parts = make()
        self._counters.replaced(attached)
        self._attached, self._schedule, self._update = parts.attached, parts.schedule, parts.update
        self._schedule.bucket_order.load(order)
        del attached
        gc.collect()  # the former parts refer to each other, and have lanes, and buffers as large as the model

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.detach()
        elif not self._detached:  # the peers may not follow: let go without another collective
            attached = self._attached
            attached.scheduler.abort(f"Rank {attached.rank} left the engine's context with {kind.__name__}.")
            self._release()
            begin_anew(attached.group)

    def _release(self) -> None:
        self._detached = True
        atexit.unregister(self._at_exit)
        self._hooks.remove()
        if self._steering is not None:
            self._steering.release()
        self._schedule.release()
        self._attached.compression.release()
        self._attached.preconditioning.release()
        for user in self._attached.users:
            user.release()
        for owner in (self._attached.model, *(user.optimizer for user in self._attached.users)):
            delattr(owner, _ddp.ENGINE)


class _Stepper:
    """What an optimizer's ``step`` calls. The engine holds it, and not the other way."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._number = weakref.ref(engine), number

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """One step of the optimizer."""
        engine = self._engine()
        assert engine is not None
        step = functools.partial(engine._step, self._number)
        return engine._attached.users[self._number].with_hooks(step, closure, engine.synchronize)


def _check_export(attached: Attached, update: Update) -> None:
    attached.synchronize()
    update.check_export()


def _show_averages(attached: Attached, update: Update) -> None:
    """``.grad`` is what plain DDP would have left there. Collective."""
    found = attached.look_at_all_grads()
    averages = update.averaged_gradients() if found.reduced else {}
    for param, placeholder in attached.placeholders:
        if param not in found.own and (stood := param.grad) is not None:
            param.grad = average = averages.get(param)
            if average is not None:
                hand_over((stood, placeholder), average)


def _finish_at_exit(engine: weakref.ref[Engine]) -> None:
    """A script may end right after step(): its peers still want the last all-gather."""
    alive = engine()
    if alive is not None and not alive._detached:
        with contextlib.suppress(Exception):
            alive.synchronize()
