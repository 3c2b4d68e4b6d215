"""The statistics that every table uses, beside those that numpy and the standard library have."""

import statistics
from collections.abc import Sequence

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
