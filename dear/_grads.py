"""Whether ``.grad`` still is what the last backward pass left there, when step() is about to use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from dear import _C
from dear._placeholders import Placeholders

Param = torch.nn.Parameter
Grads = dict[Param, torch.Tensor]

WRITTEN_LATE = (
    "Gradients were written to after they had been sent, by another backward pass or in place, as "
    ".grad.zero_() does: the last backward pass before optimizer.step() must be the one that DDP reduces, which has a "
    'forward pass of its own, and changes like that one need update="replicated".'
)


@dataclass
class Found:
    """What stands in ``.grad``, by parameter."""

    reduced: bool = False  # some have what the engine put there, or a view of that memory
    plain: bool = False  # some have such a view: a plain tensor, which writes of the user's reach at any time
    missing: list[Param] = field(default_factory=list)  # None
    own: Grads = field(default_factory=dict)  # anything else

    @property
    def nothing(self) -> bool:
        """No parameter has a gradient."""
        return not self.reduced and not self.own

    def add(self, other: Found) -> None:
        """Takes in what was found of other parameters."""
        self.reduced, self.plain = self.reduced or other.reduced, self.plain or other.plain
        self.missing += other.missing
        self.own |= other.own


class Watcher:
    """Looks at the ``.grad`` of the same parameters again and again, in one native walk."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = (None, None, None)
        self._params: list[Param] = []
        self._walk = _C.GradientWalk([], [])

    def look(self, placeholders: Placeholders, members: list[Param], unused: set[Param]) -> Found:
        """What stands there, against what the last backward pass should have left: ``placeholders``, of those that are
        ``members`` and not ``unused``, and nothing of other members. Another selection is another object: none of the
        three is changed in place."""
        of = (placeholders, members, unused)
        if any(one is not other for one, other in zip(of, self._of, strict=True)):
            managed = set(members) - unused
            expected = [(param, placeholder) for param, placeholder in placeholders if param in managed]
            served = [param for param, _ in expected]
            known = set(served)
            idle = [param for param in members if param not in known]
            self._of, self._params, self._walk = of, [*served, *idle], _C.GradientWalk(expected, idle)
        reduced, plain, missing, own = self._walk.look()
        found = Found(reduced, plain, [self._params[index] for index in missing])
        if own:
            with torch._C.DisableTorchFunctionSubclass():
                grads = [(self._params[index], self._params[index].grad) for index in own]
            found.own = {param: grad for param, grad in grads if grad is not None}
        return found


def look_without_layout(params: Iterable[Param]) -> Found:
    """The same before the first backward pass has delivered anything."""
    found = Found()
    for param in params:
        if param.grad is None:
            found.missing.append(param)
        else:
            found.own[param] = param.grad
    return found


def check_untouched(scheduler: _C.Scheduler) -> None:
    """Refuses gradients that were written to since they were reduced.

    Raises:
        RuntimeError: one sentence says what may have done so.
    """
    if not scheduler.untouched():
        raise RuntimeError(WRITTEN_LATE)


def unreduced(name: str) -> RuntimeError:
    """The error for a gradient of a pass under no_sync() that no other pass has reduced."""
    return RuntimeError(
        f"optimizer.step() found a gradient of {name} that was not reduced, since every backward pass after the last "
        "step ran under model.no_sync(): run the last backward pass before optimizer.step() outside of it."
    )


def bypassed(name: str) -> RuntimeError:
    """The error for a gradient of a backward pass whose forward pass DDP did not see."""
    return RuntimeError(
        f"optimizer.step() found a gradient of {name} that was not reduced, since the forward pass that it comes from "
        "did not go through the DistributedDataParallel module that is attached: call that one, and not model.module "
        "or another one around it, or put what you have reduced yourself into .grad as another tensor."
    )


def of_frozen(name: str) -> RuntimeError:
    """The error for a gradient of a parameter that is in no bucket of DDP's, set by hand or left from before."""
    return RuntimeError(
        f"The parameter {name} was frozen when the model was wrapped, or DDP was told to ignore it, and has a gradient "
        'all the same, which is used with update="replicated" alone: set its .grad to None.'
    )


def second(name: str) -> RuntimeError:
    """The error for a gradient of a second backward pass, where two forward passes had come before the first one."""
    return RuntimeError(
        f"optimizer.step() found a gradient of {name} that was not reduced, since DistributedDataParallel reduces one "
        "backward pass, however many forward passes came before it: sum the losses and call backward() once, or give "
        "each backward pass a forward pass of its own."
    )


def missed(name: str) -> RuntimeError:
    """The error for a parameter that a backward pass did not reach, so that DDP waits for it and reduces nothing."""
    return RuntimeError(
        f"The parameter {name} got no gradient in the last backward pass, so DDP still waits for it: wrap the model "
        "with find_unused_parameters=True, or after requires_grad=False is set."
    )


def kept(name: str) -> RuntimeError:
    """The error for a tensor in ``.grad`` that somebody keeps, to find the average in it."""
    return RuntimeError(
        f"The tensor that stands in the .grad of {name}, or what it is a view of, is kept elsewhere, where plain DDP "
        'would write the average into it, and with update="sharded" or "owned" the average exists only in shards: set '
        '.grad to None before backward(), as zero_grad() does, or use dear.attach(..., update="replicated").'
    )


def dropped(name: str) -> RuntimeError:
    """The error for a gradient that was set to None where only shards of it count."""
    return RuntimeError(
        f'The .grad of {name} was set to None after backward(), which has no effect with update="sharded" or "owned", '
        'since the average exists only in shards: use dear.attach(..., update="replicated").'
    )


def superseded(name: str) -> RuntimeError:
    """The error for a gradient in shards that was taken out of ``.grad`` before."""
    return RuntimeError(
        f'The gradient of {name} that was asked about no longer stands in .grad, and with update="sharded" or "owned" '
        "its values are gone then: read .grad again after each backward()."
    )
