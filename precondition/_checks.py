"""What is refused before a preconditioner is put to work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.nn import Parameter
from torch.optim import Optimizer


class Named(Protocol):
    """What has parameters that are changed together, as a layer."""

    name: str

    @property
    def params(self) -> Sequence[Parameter]:
        """They."""


def check_known(kind: type, unknown: Mapping[str, Any]) -> None:
    """Refuses keywords that a class of preconditioners, which its bases' errors would not name, does not take.

    Raises:
        TypeError: names the first one.
    """
    if unknown:
        parameters = inspect.signature(kind).parameters.values()
        known = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        raise TypeError(f"{kind.__name__} has no option {next(iter(unknown))}: it takes {', '.join(known)}.")


def check_positive(**values: float) -> None:
    """Refuses numbers that are not positive, by the arguments' names."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, not {value!r}.")


def check_decay(factor_decay: float) -> None:
    """Refuses a decay that is none."""
    if isinstance(factor_decay, bool) or not isinstance(factor_decay, (int, float)) or not 0 <= factor_decay < 1:
        raise ValueError(f"factor_decay must be at least 0 and below 1, not {factor_decay!r}.")


def check_interval(**values: int) -> None:
    """Refuses what is no number of steps, by the arguments' names."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a number of steps, at least 1, not {value!r}.")


def check_scaler(grad_scaler: Any) -> None:
    """Refuses what scales no loss."""
    if grad_scaler is not None and not callable(getattr(grad_scaler, "scale", None)):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, not {type(grad_scaler).__name__}.")


def check_groups(layers: Sequence[Named], optimizers: Sequence[Optimizer]) -> None:
    """Refuses a layer whose parameters stand in different groups, or in none: it has one learning rate.

    Raises:
        ValueError: names the layer.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    place = {param: index for index, group in enumerate(groups) for param in group["params"]}
    for layer in layers:
        if len({place.get(param) for param in layer.params}) > 1:
            raise ValueError(
                f"The weight and the bias of {layer.name or 'the model'} are in different groups of the optimizer, and "
                "a preconditioner changes them together: put both into one group."
            )
