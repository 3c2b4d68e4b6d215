"""Error feedback by parameter name: what was not sent yet, wherever buckets put it.

Note [Two errors]
A rank's own error is in units of its gradient. Where the shard's owner compresses the mean again, it keeps an error
too, in units of the mean. Conserved is

    sum of all gradients = world * (sum of the results + owners' errors) + sum of the ranks' errors,

so an owner's error e can always become ``world * e`` of its rank's own error, without communication. That is what
happens when the shards move: at DDP's bucket rebuild, and on resuming at another world size. Parameters move by
results, which are means: what they are still owed is the sum of the ranks' errors divided by the world size, owners'
errors included. So at another world size errors are multiplied by new / old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.group import Member


class Feedback:
    """The errors of one rank. Tensors are views of the buffers the kernels work in; all float32, flat, memory order."""

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}
        #: The parameters that have errors, here or at another place of the node: what was compressed once goes on so,
        #: also where an option that was assigned makes it less worth it, since nobody would send what it is owed else.
        self.begun: set[str] = set()
        self.owned: dict[str, tuple[int, Tensor]] = {}  # by name: first element of the parameter, values
        self.world = 1  # whose mean the owners' errors are in

    def allocate(self, members: Sequence[Member], device: torch.device) -> Tensor:
        """One flat buffer for the members' errors, one behind the other, with what was kept for them so far."""
        flat = torch.zeros(sum(member.numel for member in members), device=device)
        start = 0
        for member in members:
            view = flat[start : start + member.numel]
            if member.name in self.errors:
                view.copy_(self.errors[member.name])
            self.errors[member.name] = view
            self.begun.add(member.name)
            start += member.numel
        return flat

    def allocate_owned(self, members: Sequence[Member], begin: int, end: int, device: torch.device) -> Tensor:
        """The owner's error for elements ``[begin, end)`` of the group; what it no longer owns becomes own error."""
        flat = torch.zeros(max(0, end - begin), device=device)
        for member in members:
            low, high = max(begin, member.start), min(end, member.stop)
            first, values = self.owned.pop(member.name, (0, flat.new_empty(0)))
            old = torch.zeros(member.numel, device=device)
            old[first : first + values.numel()] = values
            if low < high:
                own = flat[low - begin : high - begin]
                own.copy_(old[low - member.start : high - member.start])
                old[low - member.start : high - member.start] = 0
                self.owned[member.name] = (low - member.start, own)
            if values.numel():
                self.errors[member.name].add_(old, alpha=self.world)
        return flat

    def norm(self) -> float:
        """Euclidean norm of this rank's own and owned error, in units of its gradient."""
        total = sum(float(error.double().square().sum()) for error in self.errors.values())
        owned = sum(float(values.double().square().sum()) for _, values in self.owned.values())
        return float((total + self.world**2 * owned) ** 0.5)

    def state(self) -> dict[str, Any]:
        """Copies of everything, to be saved."""
        return {
            "errors": {name: error.clone() for name, error in self.errors.items()},
            "owned": {name: (first, values.clone()) for name, (first, values) in self.owned.items()},
            "begun": sorted(self.begun),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes one rank's :meth:`state`; buffers come with the groups."""
        self.errors = {name: error.clone() for name, error in state["errors"].items()}
        self.owned = {name: (first, values.clone()) for name, (first, values) in state["owned"].items()}
        self.begun = {*self.errors, *state.get("begun", ())}

    def absorb(self, state: dict[str, Any], world: int) -> None:
        """Adds another rank's :meth:`state`, saved at that world size, to this rank's own error: see Note [Two
        errors]."""
        for name, error in state["errors"].items():
            total = error.clone()
            first, values = state["owned"].get(name, (0, total[:0]))
            total[first : first + values.numel()].add_(values, alpha=world)
            total.mul_(self.world / world)
            self.errors[name] = self.errors[name] + total if name in self.errors else total
