"""Trials: a few timed steps of each setting while training goes on, and which of the settings is the fastest.

Note [Pairs]
The load of a machine changes while settings are tried, and falls on one of them. So each way, at its best size, is
tried again in passes, in which the ways alternate. A pass goes through them in the other direction than the one before
it, so that a load which grows all the time favours none. In each pass, of which the trials are the first, the ratio of
two ways' times counts, and of all ratios the median. A load that comes, or goes, spoils one pass; one that passes by
spoils one, or two in opposite directions.

Passes go on as long as there are steps, since a step of a few milliseconds may take half as long again as the next. A
way that was clearly slower in each of two passes or more takes part in no other: a change of load has spoilt one of
them at the most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from compress import losses

from .deciding import PLAIN, Way

TIMED = 3  # steps of a trial, behind those that are not timed: see untimed()
PASSES, PAIRED = 2, 2  # of the last comparison, at the least, and timed steps of each way in one
SETTLED = (
    2  # steps before those: the second takes 2 ms longer, which is much of a short one, and a trial's median hides
)
CLEARLY = 1.1  # times as long
FORESEEN = 0.05  # standard deviation of what is predicted of one size beside another, as a share
MEDIAN = 0.4  # standard deviation of the median of three normal deviations, as a share of their expected range
NEVER = 1e9  # seconds, of what could not be tried
LEVEL = 1.01  # what is this close to the fastest is as fast

Setting = tuple[Way, float]  # and its size in MiB


class Ranks(Protocol):
    """All ranks, which make the same trials. Both are collective: see :class:`dear.choosing.Steering`."""

    def tell(self, value: Any, label: str) -> Any: ...

    def everyones(self, value: Any, label: str) -> list[Any]: ...


class Search(Protocol):
    def ask(self) -> float | None: ...

    def tell(self, size: float, seconds: float) -> None: ...


@dataclass(frozen=True)
class Trial:
    """Measured. seconds: of a step, the slowest rank's; NEVER where it could not be tried."""

    way: Way
    mib: float
    seconds: float

    @property
    def setting(self) -> Setting:
        return self.way, self.mib


class Trials:
    """Of one search. What yields waits for the next step boundary with each yield, on every rank alike."""

    def __init__(
        self,
        ranks: Ranks,
        clock: Callable[[], float],
        go: Callable[[Way, float], None],
        warn: Callable[[str], None],
        foreseen: Callable[[Way, float], float] | None = None,
    ) -> None:
        """go: trains with a setting from now on, or raises ValueError where it cannot serve. foreseen: seconds that are
        predicted of one; on rank 0."""
        self.made: list[Trial] = []
        self._ranks, self._clock, self._go, self._warn = ranks, clock, go, warn
        self._last: Setting | None = None  # that was tried
        self._steps = 0
        self._foreseen, self._spreads = foreseen, list[float]()  # by trial: the range of its times, as a share

    @property
    def best(self) -> Trial:
        return fastest(self.made)

    def sizes(self, way: Way) -> list[tuple[float, float]]:
        """MiB and seconds of its trials, the fastest first."""
        own = [(one.mib, one.seconds) for one in self.made if one.way == way and one.seconds < NEVER]
        return sorted(own, key=lambda one: one[1])

    def attempt(self, way: Way, mib: float, timed: int = TIMED) -> Generator[None, None, Trial]:
        """A trial, kept on every rank alike."""
        trial = Trial(way, mib, (yield from self._measured(way, mib, untimed(way), timed)))
        self.made.append(trial)
        return trial

    def refine(self, search: Search | None, left: int) -> Iterator[None]:
        """Other sizes of the best way, in what the last comparison leaves of so many steps. search: on rank 0, which
        decides."""
        way = self.best.way
        ways = {one.way for one in self.made if one.seconds < NEVER}
        left -= finale_steps(max(2, len(ways)))
        for _ in range(left // (untimed(way) + TIMED)):
            mib = self._ranks.tell(search.ask() if search else None, "the size to try")
            if mib is None:
                return
            trial = yield from self.attempt(way, mib)
            if search is not None:
                search.tell(mib, trial.seconds)

    def finalists(self) -> list[Trial]:
        """Who is compared in the end, the best first: each way at its best size, plain DDP among them, since nothing
        may be slower than it. Where there is one way alone, two sizes of it. Rank 0 decides.

        The size is that of the shortest time, measured and predicted: a geometric mean, in which each has the weight
        that its variance leaves it. Where steps vary little, the measured time counts alone.
        """
        rest = sorted((one for one in self.made if one.seconds < NEVER), key=self._score)
        ways: dict[Way, Trial] = {}
        for one in rest:
            ways.setdefault(one.way, one)
        found = sorted(ways.values(), key=lambda one: one.seconds)
        found += [one for one in rest if one.mib != found[0].mib][:1] if len(found) == 1 else []
        chosen: list[Trial] = self._ranks.tell(found, "who is compared")
        return chosen

    def _score(self, one: Trial) -> float:
        """Comparable within a way: what is predicted may be off by a factor, for all of its sizes alike."""
        if self._foreseen is None:
            return one.seconds
        noise = MEDIAN * statistics.median(self._spreads) / FORESEEN
        weight = 1 / (1 + noise**2)
        return float(one.seconds**weight * self._foreseen(one.way, one.mib) ** (1 - weight))

    def finale(self, finalists: Sequence[Trial], left: int) -> Generator[None, None, list[Trial]]:
        """Compares these in turn, in so many steps; what each takes by that, as a multiple of what the first one does.
        See Note [Pairs]."""
        took = {one.setting: [one.seconds] for one in finalists}
        first = took[finalists[0].setting]
        until, racing = self._steps + left, list(finalists)
        while len(racing) > 1 and self._steps + self._pass_steps(racing) <= until:
            for one in racing:
                took[one.setting].append((yield from self._measured(one.way, one.mib, SETTLED, PAIRED)))
            racing = [one for one in reversed(racing) if not _clearly_slower(took[one.setting], first)]
        seconds = statistics.median(first)
        return [Trial(way, mib, seconds * statistics.median(_ratios(own, first))) for (way, mib), own in took.items()]

    def _pass_steps(self, racing: Sequence[Trial]) -> int:
        return sum(PAIRED + self._untimed(one.setting, SETTLED) for one in racing)

    def _untimed(self, setting: Setting, new: int) -> int:
        """new: where the setting changes. One also where it stays: while ranks exchanged times, what was in flight has
        arrived, and the first step waits for less."""
        return new if setting != self._last else 1

    def _measured(self, way: Way, mib: float, new: int, timed: int) -> Generator[None, None, float]:
        """Seconds of a step: the slowest rank's in each, the median over them."""
        try:
            self._go(way, mib)
        except ValueError as error:
            self._warn(f"{way} is not tried ({str(error).rstrip('.')}).")
            return NEVER
        before = self._untimed((way, mib), new)
        for _ in range(before):
            yield
        self._last = way, mib
        self._steps += before + timed
        times, last = [], self._clock()
        for _ in range(timed):
            yield
            now = self._clock()
            times.append(now - last)
            last = now
        everyone = self._ranks.everyones(times, "the times of a trial")
        slowest = [max(step) for step in zip(*everyone, strict=True)]
        seconds = statistics.median(slowest)
        if math.isfinite(seconds) and seconds > 0:
            self._spreads.append((max(slowest) - min(slowest)) / seconds)
            return seconds
        self._warn(f"{way} took {seconds} s a step by some rank's clock, and is not chosen.")
        return NEVER


def untimed(way: Way) -> int:
    """Steps until a trial shows what it takes: parts that are new lay their buckets in the first, and use them in the
    second."""
    return 1 if way.method is None and way.update != PLAIN else 2


def finale_steps(finalists: int) -> int:
    """That the comparison of so many takes at the most, in as few passes as there may be."""
    return PASSES * finalists * (SETTLED + PAIRED)


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """By pass, as long as both were in it."""
    return [own / other for own, other in zip(times, others, strict=False)]


def _clearly_slower(times: Sequence[float], others: Sequence[float]) -> bool:
    return len(times) > 1 and min(_ratios(times, others)) > CLEARLY


def fastest(trials: Sequence[Trial]) -> Trial:
    """Of those that are as fast, the one that loses least."""
    least = min(trial.seconds for trial in trials)
    level = [trial for trial in trials if trial.seconds <= LEVEL * least]
    return min(level, key=lambda trial: (losses.above(trial.way.method), trial.seconds))
