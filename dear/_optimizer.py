"""The user's optimizer, run on what is to be updated, when it is to be updated.

The optimizer object stays the user's: its groups, hyper-parameters and ``step`` are used as they are. For one call
its ``param_groups`` and ``state`` are replaced by those of the work at hand.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import optim
from torch.optim import optimizer as _all_optimizers

Groups = list[dict[str, Any]]
Step = Callable[[Callable[[], Any] | None], Any]

# Exact types: a subclass may override step(). Their update of an element depends on that element alone.
ELEMENTWISE = {
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.Rprop,
    optim.ASGD,
}
# Their update of a parameter depends on that parameter alone, so groups of parameters can be updated one by one.
PER_PARAMETER = ELEMENTWISE | {getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)}


class UserOptimizer:
    """An optimizer whose ``step`` and ``zero_grad`` are taken over until :meth:`release`."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.original_step = optimizer.step
        self.note_members()
        self._zero_grad: Any = None

    def take_over(self, step: Step) -> None:
        """``optimizer.step`` is this bound method from now on; its owner is not kept alive."""
        held = weakref.WeakMethod(step)  # type: ignore[arg-type]

        @functools.wraps(self.original_step)
        def dear_step(optimizer: optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            alive = held()
            assert alive is not None
            return alive(closure)

        kind = type(self.optimizer)

        def dear_zero_grad(optimizer: optim.Optimizer, set_to_none: bool = True) -> None:
            # It touches .grad alone, which needs no wait; without this it would ask each pending parameter's class.
            with torch._C.DisableTorchFunctionSubclass() if set_to_none else contextlib.nullcontext():
                kind.zero_grad(optimizer, set_to_none)

        self.optimizer.step = types.MethodType(dear_step, self.optimizer)  # type: ignore[method-assign]
        if "zero_grad" not in self.optimizer.__dict__:
            self._zero_grad = types.MethodType(dear_zero_grad, self.optimizer)
            self.optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]

    def release(self) -> None:
        """Gives the optimizer's methods back."""
        self.optimizer.step = self.original_step  # type: ignore[method-assign]
        if self._zero_grad is not None and self.optimizer.__dict__.get("zero_grad") is self._zero_grad:
            del self.optimizer.__dict__["zero_grad"]

    # --- what it manages ---

    def listed(self) -> list[torch.nn.Parameter]:
        """Its parameters as they are in its groups now."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def has_other_members(self) -> bool:
        """Whether parameters were added, removed or regrouped since :meth:`note_members`."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return sizes != self._sizes or any(a is not b for a, b in zip(self.listed(), self.params, strict=True))

    def note_members(self) -> None:
        """Takes its parameters and groups as they are now."""
        self.params = self.listed()
        self._sizes = [len(group["params"]) for group in self.optimizer.param_groups]

    @property
    def has_step_hooks(self) -> bool:
        """Whether somebody wants to be called before or after each step, and so expects one call for everything."""
        own = self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks
        return bool(own or _all_optimizers._global_optimizer_pre_hooks or _all_optimizers._global_optimizer_post_hooks)

    @property
    def updates_one_by_one(self) -> bool:
        """Whether its step may be made on some parameters at a time."""
        return type(self.optimizer) in PER_PARAMETER and not self.has_step_hooks

    # --- the step ---

    def hyper_parameters(self) -> Groups:
        """The groups as they stand, without their parameters; a copy that later changes do not reach."""
        return [
            {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            for group in self.optimizer.param_groups
        ]

    def run(self, groups: Groups, state: Any) -> None:
        """One step on these groups with this state."""
        with self._replaced(groups, state):
            self.original_step()  # type: ignore[call-arg]

    @contextlib.contextmanager
    def _replaced(self, groups: Groups, state: Any) -> Iterator[None]:
        kept = self.optimizer.param_groups, self.optimizer.state
        self.optimizer.param_groups, self.optimizer.state = groups, state
        try:
            yield
        finally:
            self.optimizer.param_groups, self.optimizer.state = kept
