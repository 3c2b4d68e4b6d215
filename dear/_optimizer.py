"""The user's optimizer, run on what is to be updated, when it is to be updated.

The optimizer object stays the user's: its groups, hyper-parameters and ``step`` are used as they are. For one call
its ``param_groups`` and ``state`` are replaced by those of the work at hand.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import optim
from torch.optim import optimizer as _all_optimizers

from dear._compiled import uncompiled
from dear._other_steps import OtherSteps

# Of all optimizers, before and after a step.
_GLOBAL_HOOKS: Any = (_all_optimizers._global_optimizer_pre_hooks, _all_optimizers._global_optimizer_post_hooks)

Groups = list[dict[str, Any]]
Step = Callable[[Callable[[], Any] | None], Any]

# What an update exchanges for its time, and methods.
_EXCHANGED = {
    "param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "step", "zero_grad",
    "_opt_called",
}  # fmt: skip

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


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer that a wrapper holds in ``.optimizer``, as those of Accelerate and Lightning do, through
    however many wrappers; anything else as it is."""
    inner = optimizer
    for _ in range(8):
        if isinstance(inner, optim.Optimizer) and is_initialized(inner):
            return inner
        inner = getattr(inner, "optimizer", None)
    return optimizer


def is_initialized(optimizer: optim.Optimizer) -> bool:
    """Whether ``Optimizer.__init__()`` was called: many wrappers are optimizers in name only, and show the groups and
    the state of another as theirs."""
    own = {"param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_state_dict_pre_hooks"}
    return vars(optimizer).keys() >= own


class UserOptimizer:
    """An optimizer whose ``step`` and ``zero_grad`` are taken over until :meth:`release`."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.original_step = optimizer.step
        self._compiled = _is_compiled(self.original_step)
        self.is_first_update = True  # it has not made its state yet: see Note [The first update] in _update.py
        self.note_members()
        self._owner: weakref.WeakMethod[Any] | None = None
        self._ours: dict[str, Any] = {}  # methods of the optimizer that are ours
        self._others: OtherSteps | None = None
        self._former: Any = None  # its own step, where it had one beside its class's

    def take_over(self, step: Step) -> None:
        """``optimizer.step`` is this bound method from now on; its owner is not kept alive."""
        self._owner = weakref.WeakMethod(step)  # type: ignore[arg-type]
        self._others = OtherSteps(self.optimizer)

        @uncompiled
        @functools.wraps(self.original_step)
        def dear_step(optimizer: optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            taken = self._owner() if self._owner is not None else None
            return (taken or self.original_step)(closure)  # somebody may have wrapped this one, and hold it for good

        kind = type(self.optimizer)

        @uncompiled
        def dear_zero_grad(optimizer: optim.Optimizer, set_to_none: bool = True) -> None:
            # It touches .grad alone, which needs no wait; without this it would ask each pending parameter's class.
            with torch._C.DisableTorchFunctionSubclass() if set_to_none else contextlib.nullcontext():
                kind.zero_grad(optimizer, set_to_none)

        self._ours = {"step": types.MethodType(dear_step, self.optimizer)}
        if "zero_grad" not in self.optimizer.__dict__:
            self._ours["zero_grad"] = types.MethodType(dear_zero_grad, self.optimizer)
        self._former = self.optimizer.__dict__.get("step")
        self.optimizer.__dict__.update(self._ours)

    def release(self) -> None:
        """Gives the optimizer's methods back, but for those that somebody has replaced or wrapped since."""
        self._owner = None
        if self._others is not None:
            self._others.release()
        for name, method in self._ours.items():
            if self.optimizer.__dict__.get(name) is method:
                del self.optimizer.__dict__[name]
        if self._former is not None and "step" not in self.optimizer.__dict__:
            self.optimizer.__dict__["step"] = self._former

    def state_of_run(self) -> dict[str, Any]:
        """Its state, which is that of the run.

        Raises:
            RuntimeError: another optimizer has taken its place, or it has state that cannot be saved.
        """
        if self._others is not None:
            self._others.check()
        self.check_listed(self.optimizer.state)
        return self.optimizer.state_dict()

    def check_listed(self, state: Iterable[Any]) -> None:
        """Before its state, of which these are the keys, is saved.

        Raises:
            RuntimeError: it has the state of parameters that no group lists, by whose places state is saved.
        """
        listed = set(self.listed())
        if any(isinstance(key, torch.Tensor) and key not in listed for key in state):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has the state of parameters that none of its groups lists, which a "
                "saved state cannot name: put them back into param_groups before the state is saved, or delete it."
            )

    # --- what it manages ---

    def listed(self) -> list[torch.nn.Parameter]:
        """Its parameters as they are in its groups now."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def has_other_members(self) -> bool:
        """Whether parameters were added, removed or regrouped since :meth:`note_members`."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return sizes != self._sizes or any(map(operator.is_not, self.listed(), self.params))

    def note_members(self) -> None:
        """Takes its parameters and groups as they are now."""
        self.params = self.listed()
        self._sizes = [len(group["params"]) for group in self.optimizer.param_groups]

    def forget_members(self) -> None:
        """Whatever it has, :meth:`has_other_members` says so next time."""
        self._sizes = [-1]

    @property
    def updates_one_by_one(self) -> bool:
        """Whether its step may be made on some parameters at a time, by its class, which a compiled step is not of."""
        return type(self.optimizer) in PER_PARAMETER and not self._compiled

    # --- the step ---

    def groups(self) -> Groups:
        """The groups as they stand, parameters and hyper-parameters; a copy that later changes do not reach."""

        def copied(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.clone()
            if isinstance(value, list):
                return list(value)
            if isinstance(value, tuple) and any(isinstance(each, torch.Tensor) for each in value):  # betas may be
                return tuple(map(copied, value))
            return value

        return [{key: copied(value) for key, value in group.items()} for group in self.optimizer.param_groups]

    def attributes(self) -> dict[str, Any]:
        """What else stands in the optimizer: GradScaler leaves something there for one step alone."""
        return {name: value for name, value in vars(self.optimizer).items() if name not in _EXCHANGED}

    def run_aside(self, groups: Groups, state: Any, attributes: dict[str, Any]) -> None:
        """One step on these groups with this state and these :meth:`attributes`, without hooks, of an optimizer of
        torch's: on an object of its own, since the user may read and change this one on another thread meanwhile."""
        kind = type(self.optimizer)
        aside = kind.__new__(kind)
        vars(aside).update(attributes)
        aside.param_groups, aside.state = groups, state
        # As torch's own wrapper of step() does, but for the hooks: taking those away would be seen by other threads.
        with torch.autograd.profiler.record_function(f"Optimizer.step#{kind.__name__}.step"):
            kind.step.__wrapped__(aside)  # type: ignore[attr-defined]

    def run(self, groups: Groups, state: Any, closure: Callable[[], Any] | None = None) -> None:
        """One step on these groups with this state, without the user's hooks.

        Raises:
            RuntimeError: the first one has drawn random numbers: ranks that update different parameters would draw
                other ones than DDP's replicas, which draw the same, and their generators would part.
        """
        kept = self.optimizer.param_groups, self.optimizer.state
        self.optimizer.param_groups, self.optimizer.state = groups, state
        device = groups[0]["params"][0].device
        before = generators(device) if self.is_first_update else []
        try:
            self.run_all(closure)
        finally:
            self.optimizer.param_groups, self.optimizer.state = kept
        if self.is_first_update:
            check_draws(self.optimizer, before, device)

    def run_all(self, closure: Callable[[], Any] | None) -> Any:
        """One step on everything, without the user's hooks."""
        own = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        self.optimizer._optimizer_step_pre_hooks = OrderedDict()
        self.optimizer._optimizer_step_post_hooks = OrderedDict()
        try:
            with _no_global_hooks():
                return self.original_step(closure)  # type: ignore[call-overload]
        finally:
            self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks = own

    def with_hooks(self, step: Step, closure: Callable[[], Any] | None, finish: Callable[[], None]) -> Any:
        """``step(closure)`` between the user's hooks before and after a step, as torch calls them; those after it find
        everything finished."""
        arguments: Any = (self.optimizer,) if closure is None else (self.optimizer, closure)
        options: dict[str, Any] = {}
        for before in (*_GLOBAL_HOOKS[0].values(), *self.optimizer._optimizer_step_pre_hooks.values()):
            changed = before(self.optimizer, arguments, options)
            if changed is not None:
                arguments, options = changed
        _, *rest = arguments
        result = step(rest[0] if rest else options.get("closure"))
        after = (*self.optimizer._optimizer_step_post_hooks.values(), *_GLOBAL_HOOKS[1].values())
        if after:
            finish()
        for hook in after:
            hook(self.optimizer, arguments, options)
        return result


def _is_compiled(step: Any) -> bool:
    """Whether it is what ``torch.compile()`` returned, or wraps that, as schedules of the learning rate do."""
    while step is not None:
        if hasattr(step, "_torchdynamo_orig_callable") and not getattr(step, "_torchdynamo_disable", False):
            return True
        step = getattr(step, "__func__", None) or getattr(step, "__wrapped__", None)
    return False


@contextlib.contextmanager
def _no_global_hooks() -> Iterator[None]:
    everyones = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS]
    for hooks, _ in everyones:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in everyones:
            hooks.update(content)


def generators(device: torch.device) -> list[torch.Tensor]:
    """The states of the default generators that an update there may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def check_draws(optimizer: optim.Optimizer, before: list[torch.Tensor], device: torch.device) -> None:
    """Compares the generators with what they were before an update.

    Raises:
        RuntimeError: the update has drawn from one.
    """
    if not all(map(torch.equal, before, generators(device))):
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() draws random numbers, and each rank would draw others for the "
            'parameters that it updates: use update="replicated".'
        )
