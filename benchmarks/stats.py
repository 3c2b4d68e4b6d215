"""The statistics that every table uses, beside those that numpy and the standard library have."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SMOOTHED_OVER = 9  # steps: the loss of single batches of a few hundred bytes is noisy


def trailing_mean(values: Sequence[float], over: int = SMOOTHED_OVER) -> list[float]:
    """The mean of each value and of those up to `over` - 1 before it."""
    return [statistics.mean(values[max(0, end - over) : end]) for end in range(1, len(values) + 1)]


def first_at(curve: Sequence[float], target: float) -> int | None:
    """How many steps it took until the loss was at the target, or None."""
    return next((step for step, loss in enumerate(curve, start=1) if loss <= target), None)


def slowest_rank(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """Per step, the longest time of any rank: a step is over when the last rank is."""
    return np.max(per_rank, axis=0).tolist()


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of theirs / ours, each pair measured moments apart: above 1 means ours took less time.

    A ratio of two medians would compare moments that may lie minutes apart; on a machine that drifts, pairs do not.
    """
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def share_of_others(machine: float, own: float, wall: float, cpus: int | None) -> float | None:
    """What is left of the machine's CPU seconds after a benchmark's own, as a share of all that so many CPUs have.

    None where nothing was timed, or where the machine did not say how many it has, as in older results.
    """
    return max(0.0, machine - own) / (wall * cpus) if wall and cpus else None


def taken_meanwhile(cells: Iterable[dict[str, Any]]) -> float | None:
    """The share that others took of cells which one process measured (worker.accounted), 0 to 1; None where unknown."""
    known = [(*cell["user_s"], cell["wall_s"], cell["cpus"]) for cell in cells if cell.get("user_s")]
    if not known:
        return None
    machine, own, wall, (cpus, *_) = zip(*known, strict=True)
    return share_of_others(sum(machine), sum(own), sum(wall), cpus)


# Strategies of a cell of the training benchmark

FLOOR = "none"  # the strategy that exchanges nothing


def finished(strategy: dict[str, Any]) -> bool:
    return not strategy["failure"] and bool(strategy["blocks"])


def round_times(strategy: dict[str, Any]) -> list[float]:
    """Median step of each round, in ms, a step being as long as its slowest rank."""
    return [statistics.median(slowest_rank(block["ms"])) for block in strategy["blocks"]]


def is_plain_ddp(name: str) -> bool:
    """Uncompressed DDP at any bucket size: the rivals whose best is the baseline."""
    return name == "ddp" or name.startswith("ddp:")


def best_ddp(strategies: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The plain DDP with the smallest median: choosing it by the same numbers favours DDP."""
    candidates = [one for one in strategies if is_plain_ddp(one["name"]) and finished(one)]
    return min(candidates, key=lambda one: statistics.median(round_times(one)), default=None)


def taken_by_others(cell: dict[str, Any]) -> float | None:
    """Share of the machine's CPU that programs other than the workers took while steps were timed, 0 to 1."""
    machine = workers = wall = 0.0
    for block in (block for one in cell["strategies"] for block in one["blocks"]):
        ranks = block.get("user_s") or [None]
        if None in ranks:
            return None
        machine += ranks[0][0]
        workers += sum(own for _, own in ranks)
        wall += sum(slowest_rank(block["ms"])) / 1e3
    return share_of_others(machine, workers, wall, cell.get("cpus"))
