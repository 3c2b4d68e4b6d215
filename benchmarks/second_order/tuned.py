"""What a search for learning rates has found, and each method at its best. From raw JSON alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..stats import first_at, trailing_mean

PLAIN = "sgd"  # what the others are compared with


@dataclass(frozen=True)
class Tried:
    """A method at one learning rate."""

    method: str
    learning_rate: float
    lowest: float  # smoothed training loss; infinite if it diverged or failed
    steps: int | None  # to the goal; None: never
    held_out: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Best:
    """A method at the best rate of those tried."""

    chosen: Tried
    others: tuple[Tried, ...]  # all of them, lowest rate first
    at_an_end: bool  # of the rates: a better one may lie beyond


def method_of(name: str) -> str:
    """Of "eva/dear@0.01"."""
    return name.partition("/")[0]


def goal(strategies: Sequence[dict[str, Any]]) -> float:
    """SGD's lowest smoothed training loss at any rate; infinite without one."""
    return min((_lowest(one["losses"]) for one in strategies if method_of(one["name"]) == PLAIN), default=math.inf)


def best(cell: dict[str, Any]) -> dict[str, Best]:
    """By method: the rate at which SGD's lowest loss came after the fewest steps, or else the loss was lowest."""
    target = goal(cell["strategies"])
    found: dict[str, list[Tried]] = {}
    for one in cell["strategies"]:
        tried = _tried(one, target)
        found.setdefault(tried.method, []).append(tried)
    return {method: _best(sorted(several, key=lambda one: one.learning_rate)) for method, several in found.items()}


def best_rates(cells: Sequence[dict[str, Any]], workload: str) -> dict[str, float]:
    """By method, of the cells of a search; without those that failed at every rate."""
    found: dict[str, float] = {}
    for cell in cells:
        if cell["plan"]["workload"] == workload:
            whole = {method: one.chosen for method, one in best(cell).items()}
            found |= {method: one.learning_rate for method, one in whole.items() if math.isfinite(one.lowest)}
    return found


def _best(several: list[Tried]) -> Best:
    chosen = min(several, key=lambda one: (one.steps is None, one.steps or 0, one.lowest))
    return Best(chosen, tuple(several), len(several) > 1 and chosen in (several[0], several[-1]))


def _tried(one: dict[str, Any], target: float) -> Tried:
    name, _, rate = one["name"].partition("@")
    losses = [] if one["failure"] else one["losses"]
    steps = first_at(trailing_mean(losses), target) if losses else None
    return Tried(method_of(name), float(rate), _lowest(losses), steps, one["held_out_loss"], one["failure"])


def _lowest(losses: Sequence[float]) -> float:
    return min((loss for loss in trailing_mean(losses) if math.isfinite(loss)), default=math.inf)
