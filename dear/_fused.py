"""torch's fused optimizers on the host: where a tensor may be cut so that an update's bits stay those of the whole.

Note [Fused updates on the host]
A fused kernel updates a parameter in runs of a cache line's bytes, by vector instructions, and what is left at the end
element by element, which rounds otherwise. So a piece of a parameter is updated as in the whole where it begins such a
run, and ends one or ends the parameter; and two parameters must not be joined to one tensor.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import optim

from dear import _C
from dear._layout import Place

_RUN = 64  # bytes


def fused_parameters(optimizers: Iterable[optim.Optimizer]) -> set[torch.nn.Parameter]:
    """The parameters on the host that fused kernels update."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("fused")]
    return {param for group in groups for param in group["params"] if param.device.type == "cpu"}


def check_fused(group: dict[str, Any], known: set[torch.nn.Parameter]) -> None:
    """Refuses a fused group that has become so after its parameters were cut.

    Raises:
        RuntimeError: it has.
    """
    param = group["params"][0]
    if param.device.type == "cpu" and param not in known:
        raise RuntimeError(
            'The option fused of a parameter group was set after its parameters were cut for update="sharded" or '
            '"owned", where its updates would round otherwise: set it before dear.attach(), or use '
            'update="replicated".'
        )


def aligned_owners(numel: int, world: int, places: list[Place], itemsize: int) -> _C.Ownership:
    """Equal chunks of a bucket of these places, but for the elements that keep runs whole."""
    run = _RUN // itemsize
    even = _C.Ownership.even(numel, world)
    starts = [place.start for place in places]
    bounds = [0]
    for rank in range(world):
        end = max((end for _, end in even.ranges(rank)), default=bounds[-1])
        if 0 < end < numel:
            place = places[max(bisect.bisect_right(starts, end) - 1, 0)]
            if place.start <= end < place.stop:
                end = min(place.start + -(-(end - place.start) // run) * run, place.stop)
        bounds.append(max(end, bounds[-1]))
    bounds[-1] = numel
    return _C.Ownership(numel, [[(a, b)] if b > a else [] for a, b in itertools.pairwise(bounds)])
