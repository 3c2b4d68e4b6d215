"""Whether steps have come to take another time, and go on so: a link cut to half, or another load of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Iterator
from typing import Any

FIRST = 20  # steps until it is known what they take
PERIOD = 15.0  # seconds, about, between two looks
LOOKS = 4  # one after another that must differ: a minute
# Times as long, or as short. A link that is cut to half makes steps 1.4 to 1.7 times as long where communication is
# exposed (the GPT at 1 Gbit/s and 500 Mbit/s, benchmarks/results); where it is hidden there is nothing to choose.
OTHER = 1.25


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
        looks = 0 if first / OTHER < now < first * OTHER else looks + 1


def _slowest(steps: int, clock: Callable[[], float], everyones: Everyones) -> Generator[None, None, float]:
    times, last = [], clock()
    for _ in range(steps):
        yield
        now = clock()
        times.append(now - last)
        last = now
    return max(map(float, everyones(statistics.median(times), "the time of a step")))
