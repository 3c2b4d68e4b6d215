"""An optimizer's options, which every rank must have alike.

With sharded and owned updates replicas stay equal whatever they are: each rank would update its part with a learning
rate of its own, and nothing would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["options_of"]


def options_of(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The options that the optimizers' classes have, as numbers and what is made of them, by what a sentence calls
    them."""
    found: dict[str, Any] = {}
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            for key in optimizer.defaults:
                value = _plain(group.get(key))
                if value is not None:
                    found[f"{key} of {type(optimizer).__name__}'s group {number}"] = value
    return found


def _plain(value: Any) -> Any:
    """As it can be compared; None for what cannot, such as a function."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str)) else None
