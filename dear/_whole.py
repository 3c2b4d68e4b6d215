"""Which parameters an optimizer must see whole, and what their updates cost.

Note [Whole-matrix optimizers]
Muon orthogonalises a matrix, Adafactor factors its second moment, Shampoo and its like multiply from both sides: their
update of a parameter depends on all of its elements, so a parameter must not be cut among ranks. Optimizers that are
not torch's say so by attributes, of the object or of its class:

- ``dear_whole``: True, or a method that takes a parameter group and tells whether its parameters must stay whole (the
  other groups are updated elementwise, so that their parameters may be cut anywhere and joined);
- ``dear_cost(param)``: what the update of a whole parameter costs, in any unit, equal on every rank. Without it the
  cost is the number of elements.

Its ``step()`` is called once for each fusion group, on the parameters that this rank owns there, with copies of the
groups. So the update of a parameter must follow from the parameter, its gradient, its state and its group's options
alone, and ``step()`` must keep nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import optim

from dear._optimizer import ELEMENTWISE
from dear._own_steps import has_own_step

#: Exact types of torch's own: a subclass may override step().
WHOLE: set[type] = {getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)}
_MUON = getattr(optim, "Muon", None)


def declares_whole(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer is known to update whole parameters one by one, or says so."""
    return type(optimizer) in WHOLE or bool(getattr(optimizer, "dear_whole", False))


def stays_whole(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the parameters of one of the optimizer's groups must not be cut. Unless it is known, they must not."""
    said = getattr(optimizer, "dear_whole", True)
    if callable(said):
        return bool(said(group))
    return bool(said) and (type(optimizer) not in ELEMENTWISE or has_own_step(optimizer))


def update_cost(optimizer: optim.Optimizer) -> Callable[[torch.nn.Parameter], float]:
    """What the update of one of the optimizer's whole parameters costs, to be compared with others of its kind."""
    stated = getattr(optimizer, "dear_cost", None)
    if stated is not None:
        return lambda param: float(stated(param))
    if _MUON is not None and isinstance(optimizer, _MUON):
        return _newton_schulz
    return lambda param: float(param.numel())


def _newton_schulz(param: torch.nn.Parameter) -> float:
    """Multiplications in one iteration on [m, n], m <= n: X Xᵀ and a matrix of its size times X, m²n each, and the
    square of X Xᵀ, m³."""
    small, large = sorted(param.shape)
    return float(small * small * (2 * large + small))
