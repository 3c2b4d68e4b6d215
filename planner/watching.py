"""Whether steps have come to take another time, and go on so: a link cut to half, or another load of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Iterator
from typing import Any

FIRST = 20  # steps until it is known what they take
PERIOD = 15.0  # seconds, about, between two looks
LOOKS = 4  # one after another that must differ: a minute
HALF = 1.5  # times as long, or as short


Everyones = Callable[[Any, str], list[Any]]  # by rank


def changed(clock: Callable[[], float], everyones: Everyones) -> Iterator[None]:
    """Yields for each step boundary; ends when steps have been so much slower, or faster, for a minute.

    The ranks look at the same steps, and each knows the slowest one's: they end alike. Steps count by their median, so
    that a pause, as for an evaluation, does not.
    """
    first = yield from _slowest(FIRST, clock, everyones)
    period = max(1, round(PERIOD / first)) if first > 0 else FIRST
    looks = 0
    while looks < LOOKS:
        now = yield from _slowest(period, clock, everyones)
        looks = 0 if first / HALF < now < first * HALF else looks + 1


def _slowest(steps: int, clock: Callable[[], float], everyones: Everyones) -> Generator[None, None, float]:
    times, last = [], clock()
    for _ in range(steps):
        yield
        now = clock()
        times.append(now - last)
        last = now
    return max(map(float, everyones(statistics.median(times), "the time of a step")))
