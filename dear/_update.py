"""Running the user's optimizer on what this rank must update, when it must be updated.

The optimizer object stays the user's: its groups, hyper-parameters and ``step`` are used as they are. For one call
its ``param_groups`` (and, sharded, its ``state``) are swapped for those of the work at hand.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import optim

from dear._layout import Segment

Mode = Literal["sharded", "replicated"]
Groups = list[dict[str, Any]]

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


def choose_mode(optimizer: optim.Optimizer, update: str, compresses: bool = False) -> Mode:
    """The update mode for ``optimizer``, where gradients are compressed or not.

    Raises:
        ValueError: an unknown mode, or ``"sharded"`` for an optimizer that is not known to be elementwise or for
            compressed gradients.
    """
    if update not in ("auto", "sharded", "replicated"):
        raise ValueError(f'update must be "auto", "sharded" or "replicated", not {update!r}.')
    if update == "sharded" and compresses:
        raise ValueError(
            'update="sharded" gathers updated parameters, which a compressor would spoil: leave update out, or use '
            'update="replicated".'
        )
    elementwise = type(optimizer) in ELEMENTWISE and not compresses
    if update == "sharded" and not elementwise:
        raise ValueError(
            f'update="sharded" cuts parameters anywhere, and {type(optimizer).__name__} is not known to update each '
            'element on its own: use update="replicated".'
        )
    return "sharded" if elementwise and update != "replicated" else "replicated"


@contextlib.contextmanager
def _swapped(optimizer: optim.Optimizer, groups: Groups, state: Any) -> Iterator[None]:
    kept = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    try:
        yield
    finally:
        optimizer.param_groups, optimizer.state = kept


class ShardedUpdate:
    """Updates this rank's segments, whose gradients are the averaged shards."""

    def __init__(self, optimizer: optim.Optimizer, step: Callable[[], Any]) -> None:
        self.optimizer = optimizer
        self.step = step
        self.state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        self.segments: list[Segment] = []

    def run(self, segments: list[Segment]) -> None:
        """One update of these segments with the hyper-parameters as they stand."""
        groups: Groups = []
        for index, group in enumerate(self.optimizer.param_groups):
            tensors = [segment.tensor for segment in segments if segment.group == index]
            if tensors:
                groups.append({**group, "params": tensors})
        if not groups:
            return
        with _swapped(self.optimizer, groups, self.state):
            self.step()


class ReplicatedUpdate:
    """Updates whole parameters, each when its averaged gradient has come, with the hyper-parameters of step()."""

    def __init__(self, optimizer: optim.Optimizer, step: Callable[[], Any]) -> None:
        self.optimizer = optimizer
        self.step = step
        self._captured: Groups = []

    def capture(self) -> None:
        """Notes the hyper-parameters for the updates that follow."""
        self._captured = [
            {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in group.items()
                if key != "params"
            }
            for group in self.optimizer.param_groups
        ]

    def run(self, grads: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        """One update of these parameters with these gradients."""
        groups: Groups = []
        for group, captured in zip(self.optimizer.param_groups, self._captured, strict=True):
            params = [param for param in group["params"] if param in grads]
            if params:
                groups.append({**captured, "params": params})
        if not groups:
            return
        shown = {param: param.grad for param in grads}
        for param, grad in grads.items():
            param.grad = grad
        try:
            with _swapped(self.optimizer, groups, self.optimizer.state):
                self.step()
        finally:
            for param, before in shown.items():
                param.grad = before
