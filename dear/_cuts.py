"""Where a parameter on the host may be cut so that an update's bits stay those of the whole.

Note [Updates on the host]
torch's kernels update a tensor by vector instructions, and what is left at the end element by element. In two cases
the second way rounds otherwise than the first, so it matters where an element stands, and two parameters must not be
joined to one tensor:
- A fused optimizer's kernels work in runs of a cache line's bytes. A piece of a parameter is updated as in the whole
  where it begins such a run, and ends one or ends the parameter.
- Types of 16 bits, of which a vector's arithmetic is done in float32 and rounded once. What is left follows every
  thread's share, which depends on the tensor's length, so such a parameter is not cut at all.
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
_HALVES = (torch.float16, torch.bfloat16)


def fused_parameters(optimizers: Iterable[optim.Optimizer]) -> set[torch.nn.Parameter]:
    """The parameters on the host that fused kernels update."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("fused")]
    return {param for group in groups for param in group["params"] if param.device.type == "cpu"}


def _is_half(param: torch.nn.Parameter) -> bool:
    return param.device.type == "cpu" and param.dtype in _HALVES


def kept_apart(optimizers: Iterable[optim.Optimizer]) -> set[torch.nn.Parameter]:
    """The parameters that must not be joined with others."""
    optimizers = list(optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return fused_parameters(optimizers) | {param for group in groups for param in group["params"] if _is_half(param)}


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
    """Equal chunks of a bucket of these places, but for the elements that keep whole what must not be cut."""
    run = _RUN // itemsize
    even = _C.Ownership.even(numel, world)
    starts = [place.start for place in places]
    bounds = [0]
    for rank in range(world):
        end = max((end for _, end in even.ranges(rank)), default=bounds[-1])
        if 0 < end < numel:
            place = places[max(bisect.bisect_right(starts, end) - 1, 0)]
            if place.start < end < place.stop:
                whole = place.start + -(-(end - place.start) // run) * run
                end = place.stop if _is_half(place.param) else min(whole, place.stop)
        bounds.append(max(end, bounds[-1]))
    bounds[-1] = numel
    return _C.Ownership(numel, [[(a, b)] if b > a else [] for a, b in itertools.pairwise(bounds)])
