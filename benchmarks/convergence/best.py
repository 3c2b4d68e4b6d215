"""Each method at its own best learning rate: loss by step, by bytes and by predicted time. From raw JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from ..losses import DENSE
from ..network.rates import bits, show_rate
from ..tables import note, table, value


@dataclass(frozen=True)
class Best:
    """A strategy under an optimizer, at the learning rate with the lowest mean held-out loss."""

    strategy: str
    optimizer: str
    learning_rate: float
    at_an_end: bool  # of the learning rates that were tried: a better one may lie beyond
    held_out: tuple[float, ...]  # by seed, after the last step
    curve: tuple[tuple[int, float], ...]  # step, mean held-out loss over the seeds
    bytes_per_step: int  # that one rank sends
    seeds: tuple[int, ...] = ()  # in the order of held_out
    steps_to_dense: float | None = None  # until the curve is as low as dense ends at its own best; None: never

    @property
    def loss(self) -> float:
        return statistics.mean(self.held_out)

    def over(self, other: Best, least: int = 1) -> float | None:
        """Its mean loss over that of ``other``, of the seeds that both were trained with; None where these are fewer
        than ``least``. Seeds differ by more than methods do."""
        own, others = (dict(zip(each.seeds, each.held_out, strict=True)) for each in (self, other))
        both = own.keys() & others.keys()
        return sum(own[seed] for seed in both) / sum(others[seed] for seed in both) if len(both) >= least else None

    def seconds_to_dense(self, compute: float, bits_per_second: float) -> float | None:
        """Predicted: every step takes its compute time and the time that its bytes take, and neither hides the
        other."""
        if self.steps_to_dense is None:
            return None
        return self.steps_to_dense * (compute + 8 * self.bytes_per_step / bits_per_second)


def best(cells: Sequence[dict[str, Any]]) -> list[Best]:
    """One for each strategy and optimizer that finished, in the order of the cells. Of a seed that was trained with
    twice, the first run counts: repetitions on one machine are equal to the bit, and no more evidence."""
    runs: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for cell in cells:
        if not cell["failure"] and cell["held_out"] and math.isfinite(cell["held_out"][-1][1]):
            experiment = cell["plan"]
            rates = runs.setdefault((experiment["optimizer"], experiment["strategy"]), {})
            own = rates.setdefault(experiment["learning_rate"], [])
            if all(experiment["seed"] != other["plan"]["seed"] for other in own):
                own.append(cell)
    found = [_at_best_rate(optimizer, strategy, rates) for (optimizer, strategy), rates in runs.items()]
    goals = {one.optimizer: one.loss for one in found if one.strategy == DENSE}
    return [_with_goal(one, goals.get(one.optimizer)) for one in found]


def _at_best_rate(optimizer: str, strategy: str, rates: dict[float, list[dict[str, Any]]]) -> Best:
    def loss(rate: float) -> float:
        return statistics.mean(cell["held_out"][-1][1] for cell in rates[rate])

    most = max(map(len, rates.values()))
    whole = [rate for rate in rates if len(rates[rate]) == most]  # a rate at which a seed failed is not the best
    chosen = min(whole, key=loss)
    seeds = [cell["held_out"] for cell in rates[chosen]]
    curve = tuple((int(looks[0][0]), statistics.mean(one for _, one in looks)) for looks in zip(*seeds, strict=False))
    held_out = tuple(looks[-1][1] for looks in seeds)
    at_an_end = len(rates) > 1 and chosen in (min(rates), max(rates))
    trained, sent = tuple(cell["plan"]["seed"] for cell in rates[chosen]), rates[chosen][0].get("bytes_per_step", 0)
    return Best(strategy, optimizer, chosen, at_an_end, held_out, curve, sent, trained)


def _with_goal(one: Best, goal: float | None) -> Best:
    steps = None if goal is None else steps_to(one.curve, goal)
    return replace(one, steps_to_dense=steps)


def steps_to(curve: Sequence[tuple[int, float]], goal: float) -> float | None:
    """At which step the curve first comes down to that loss, on a straight line between two looks; None: never."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= goal:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = (step, loss)
    return None


def show(cells: Sequence[dict[str, Any]], compute: float | None, rates: Sequence[str], console: Console) -> None:
    """A table for each optimizer. compute: seconds that a step computes; None: no times are predicted."""
    found = best(cells)
    for optimizer in dict.fromkeys(one.optimizer for one in found):
        _show_one([one for one in found if one.optimizer == optimizer], cells[0], compute, rates, console)
    note(
        console,
        "Each method at the best of the learning rates tried; *: the best is the smallest or largest of them. Steps: "
        f"until held-out loss is as low as {DENSE}'s at its end. PREDICTED times: compute + bytes / rate, by step.",
    )


def _show_one(
    found: Sequence[Best], cell: dict[str, Any], compute: float | None, rates: Sequence[str], console: Console
) -> None:
    experiment, dense = cell["plan"], next((one for one in found if one.strategy == DENSE), None)
    title = (
        f"{experiment['workload']}: {experiment['steps']} steps · {cell['workers']} workers · {found[0].optimizer}, "
        "own best learning rate"
    )
    times = [] if compute is None else [f"PREDICTED s,\n{show_rate(rate)}" for rate in rates]
    made = table(title, "strategy", ("lr", "seeds", "held-out\nloss", "range", "/ dense", "KB/step", "steps", *times))
    for one in found:
        ratio = None if dense is None else one.loss / dense.loss
        made.add_row(
            one.strategy,
            f"{one.learning_rate:g}{'*' if one.at_an_end else ''}",
            str(len(one.held_out)),
            f"{one.loss:.4f}",
            f"{min(one.held_out):.4f}-{max(one.held_out):.4f}",
            value(ratio, ".4f"),
            f"{one.bytes_per_step / 1e3:.0f}",
            value(one.steps_to_dense, ".0f") or "never",
            *(value(one.seconds_to_dense(compute or 0, bits(rate)), ".1f") or "never" for rate in rates if times),
        )
    console.print(made)
