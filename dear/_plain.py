"""DDP is left alone: it reduces by itself under backward, and nothing is left for later.

So it is with the setting ``"ddp"``: where a network is so fast that DDP hides its all-reduce, taking it apart wins
nothing. And so a single rank trains whatever its setting, since its own gradients are the averages. The engine stays
what it is for the user: it steps the optimizer, clips, and saves and loads its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from dear import _C, _ddp
from dear._attached import Attached
from dear._bucket_order import BucketOrder
from dear._first_pass import FirstPass
from dear._fusion import MIB
from dear._grads import Found, Grads
from dear._layout import Layout
from dear._look_again import Facts
from dear._placeholders import Placeholders
from dear._schedule import adopt_changes
from dear._update import Update, bytes_of


class NoScheduler:
    """In the place of the native scheduler, as far as the engine asks it: nothing is ever in flight."""

    def passes(self) -> int:
        return 0

    def awaited_bucket(self) -> int | None:
        return None

    def has_gradients(self) -> bool:
        return False

    def gradients_used(self) -> None: ...

    def synchronize(self) -> None: ...

    def take_wait_times(self) -> tuple[int, int]:
        return 0, 0

    def bytes_sent(self) -> int:
        """DDP does not tell."""
        return 0

    def start_trace(self) -> None: ...

    def stop_trace(self) -> list[_C.TraceEvent]:
        return []

    def abort(self, reason: str) -> None: ...

    def release(self) -> None: ...


class PlainUpdate(Update):
    """Every rank updates everything in ``step()``, with the averages that DDP left in ``.grad``."""

    kind: ClassVar[str] = "ddp"
    gathers_gradients: ClassVar[bool] = True

    def shard_of(self, full: torch.Tensor, owners: _C.Ownership) -> torch.Tensor:
        raise NotImplementedError("Nothing is cut into shards here.")

    def adopt(self, layout: Layout) -> Placeholders:
        raise NotImplementedError("There is no layout here.")

    def step(self, found: Found, optimizer: int) -> None:
        self.attached.users[optimizer].run_all(None)

    def step_with_closure(self, closure: Callable[[], Any] | None) -> tuple[bool, Any]:
        if closure is None or len(self.attached.users) > 1:
            return False, None
        return True, self.attached.user.run_all(closure)

    def finish(self, group: int) -> None:
        raise NotImplementedError("Nothing is left for later here.")

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        params = [param for user in self.attached.users for param in user.params]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)

    def averaged_gradients(self) -> Grads:
        raise NotImplementedError("They stand in .grad.")

    def stats(self) -> dict[str, Any]:
        states = (values for user in self.attached.users for values in user.optimizer.state.values())
        return {"optimizer_state_bytes": bytes_of(states), "update_balance": 1.0}

    def release(self) -> None: ...


class PlainSchedule:
    """DDP's own reducer, with buckets of another size; see :class:`dear._assembly.Timetable`.

    A single rank reduces nothing and keeps its setting, so its reducer and its forward pass are left as they are.
    """

    def __init__(self, attached: Attached, update: PlainUpdate, bucket_cap_mb: float) -> None:
        """Collective."""
        self._attached, self._update = attached, update
        self.watches_forward = attached.world > 1  # another schedule may take its place
        self._facts = Facts(attached.model, attached.names, attached.params)
        self._former_options = _ddp.reducer_options(attached.model)
        self._first_pass: FirstPass | None = None
        self.bucket_order = BucketOrder(attached)  # that of the last layout, and of the next one
        self.group_bytes = int(bucket_cap_mb * MIB)

    @property
    def group_bytes(self) -> int:
        """Size of DDP's buckets."""
        return self._group_bytes

    @group_bytes.setter
    def group_bytes(self, value: int) -> None:
        self._group_bytes = value
        self._rebuild(_ddp.ReducerOptions(value, value, self._former_options.views))

    def _rebuild(self, options: _ddp.ReducerOptions) -> bool:
        if self._attached.world == 1:
            return False
        model = self._attached.model
        self.release()
        _ddp.rebuild_reducer(model, options, self._attached.params)
        self._first_pass = FirstPass(model, "dear.attach()")
        return True

    def look_again(self) -> None:
        """As :meth:`dear._schedule.Schedule.look_again`."""
        adopt_changes(self._attached, self._update, self._facts)

    def unclaimed(self) -> None: ...

    def before_forward(self) -> None:
        if self._first_pass is not None and self._first_pass.before_forward(self._attached.model):
            self._first_pass = None

    def after_forward(self, failed: bool) -> None: ...

    def release(self) -> None:
        if self._first_pass is not None:
            self._first_pass.end()

    def restore_reducer(self) -> bool:
        """As :meth:`dear._schedule.Schedule.restore_reducer`."""
        return self._rebuild(self._former_options)
