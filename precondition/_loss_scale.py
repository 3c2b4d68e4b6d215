"""A loss that GradScaler multiplies: by how much, and whether gradients have been divided by it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer


def loss_scale(scaler: Any, like: Tensor) -> Tensor | None:
    """What the loss was multiplied by, on the device of ``like`` and without asking it; None where it was not."""
    if scaler is None or not _has_scaled(scaler):
        return None
    found = scaler.scale(torch.ones((), dtype=like.dtype, device=like.device))
    return found if isinstance(found, Tensor) else None


def check_unscaled(scaler: Any, optimizers: Iterable[Sequence[Any]]) -> None:
    """Refuses gradients that are still multiplied by the scale: preconditioned ones are not in proportion to it.

    optimizers: those whose gradients are about to be preconditioned, each with all objects that it may be known by,
        since a wrapper is another one to GradScaler than what it wraps.

    Raises:
        RuntimeError: ``unscale_()`` was not called since the last ``update()``.
    """
    states = getattr(scaler, "_per_optimizer_states", None)  # of torch's scaler, where it is enabled
    if states is None or not _has_scaled(scaler):
        return
    optimizers = list(optimizers)
    known = {id(each) for known_as in optimizers for each in known_as}
    if any(state["stage"] is OptState.UNSCALED for key, state in states.items() if key not in known):
        return  # by a wrapper that nobody has shown us
    for known_as in optimizers:
        # Not by [], which would make an entry.
        stages = [states[id(each)]["stage"] for each in known_as if id(each) in states]
        if all(stage is OptState.READY for stage in stages):
            kind = next((each for each in known_as if isinstance(each, Optimizer)), known_as[0])
            raise RuntimeError(
                f"The gradients of {type(kind).__name__} are still multiplied by the scale of grad_scaler: call "
                "scaler.unscale_(optimizer) between backward() and preconditioner.step(), or optimizer.zero_grad() "
                "where this one is not to step."
            )


def _has_scaled(scaler: Any) -> bool:
    """Torch's scaler makes its scale when it first multiplies something, and must not by our asking for it."""
    return getattr(scaler, "_scale", scaler) is not None
