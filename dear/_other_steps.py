"""Steps of an optimizer that the engine does not know: it trains rightly with averages that stand in ``.grad``, and the
engine's state is not its."""

from __future__ import annotations

import weakref
from typing import Any

from torch import optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dear._compiled import uncompiled


class OtherSteps:
    """Counts steps of others on one optimizer's parameters since its own last one."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._in_a_row = 0
        self._last = ""  # its class
        self._shares: weakref.WeakKeyDictionary[optim.Optimizer, bool] = weakref.WeakKeyDictionary()
        of = weakref.ref(self)

        # Before, and not behind: what is called behind a step finds everything finished.
        @uncompiled
        def seen(optimizer: optim.Optimizer, args: Any, options: Any) -> None:
            me = of()
            if me is not None:
                me._note(optimizer)

        self._handle = register_optimizer_step_pre_hook(seen)
        weakref.finalize(self, self._handle.remove).atexit = False

    def _note(self, optimizer: optim.Optimizer) -> None:
        if optimizer is self._optimizer:
            self._in_a_row = 0
            return
        if optimizer not in self._shares:
            self._shares[optimizer] = self._has_same_parameters(optimizer)
        if self._shares[optimizer]:
            self._in_a_row, self._last = self._in_a_row + 1, type(optimizer).__name__

    def _has_same_parameters(self, optimizer: optim.Optimizer) -> bool:
        ours = self._optimizer.param_groups
        if optimizer.param_groups is ours:  # one is around the other, as in SAM or Lookahead
            return False
        known = {id(param) for group in ours for param in group["params"]}
        return any(id(param) in known for group in optimizer.param_groups for param in group["params"])

    def check(self) -> None:
        """Refuses to take this optimizer's state for that of the run. One step may be the other's of two in turn.

        Raises:
            RuntimeError: another optimizer trains these parameters.
        """
        if self._in_a_row > 1:
            raise RuntimeError(
                f"The last {self._in_a_row} steps were those of {self._last}, which is not attached, and "
                f"engine.state_dict() would save the state of {type(self._optimizer).__name__}, which dear.attach() "
                "was given: call engine.detach() and attach the optimizer that trains."
            )

    def release(self) -> None:
        """Looks no longer."""
        self._handle.remove()
