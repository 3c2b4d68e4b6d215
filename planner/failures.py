"""What is left of a job's speed where workers fail: checkpoints, restarts, and spares that take the place of the dead.

Workers that train fail one by one, at random times (exponential), each once in ``mtbf`` seconds of training on average;
the whole job stops with the first. It goes on from its last checkpoint, after ``restart``, with a spare in the place of
the dead one, which comes back as a spare after ``repair``. Where no spare is left it waits for one. Spares that wait,
and workers of a job that waits, do not fail.

    useful share of the time = every / ((1/L) e^(L restart) (e^(L (every + checkpoint)) - 1)) · (1 - B(spares + 1, a))

with L = workers / mtbf, and B Erlang's formula for so many servers at a load a = L · repair: the share of the time in
which more workers are broken than there are spares. The first factor is exact for exponential failures (Daly, 2006,
equation 13 and its derivation); the second holds for any distribution of the time of a repair (Sevastyanov, 1957).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST = 700.0  # an exponent that a float can have


@dataclass(frozen=True)
class Failures:
    """Seconds. mtbf: of training, between two failures of one worker. checkpoint: that training stands still for one.
    restart: from a failure until the last checkpoint is loaded. repair: until a dead worker is a spare. spares: workers
    beside those that train. every: of training between two checkpoints, None for the best."""

    mtbf: float
    checkpoint: float = 30.0
    restart: float = 300.0
    repair: float = 86400.0
    spares: int = 0
    every: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mtbf < math.inf:
            raise ValueError(f"mtbf must be a time above 0, not {self.mtbf} s.")
        if self.every is not None and self.every <= 0:
            raise ValueError(f"every must be a time above 0, not {self.every} s: leave it out for the best.")

    def interval(self, workers: int) -> float:
        """Seconds of training between two checkpoints: what was given, or the best, where
        (1 - L every) e^(L (every + checkpoint)) = 1 (Daly, 2006, equation 14)."""
        if self.every is not None:
            return self.every
        rate = workers / self.mtbf
        low, high = 0.0, 1 / rate
        for _ in range(100):
            middle = (low + high) / 2
            if (1 - rate * middle) * _exp(rate * (middle + self.checkpoint)) > 1:
                low = middle
            else:
                high = middle
        return high

    def trains(self, workers: int) -> float:
        """The share of the time in which a job that is not waiting makes progress that it keeps."""
        rate, every = workers / self.mtbf, self.interval(workers)
        spent = _exp(rate * self.restart) * (_exp(rate * (every + self.checkpoint)) - 1) / rate
        return min(1.0, every / spent) if spent > 0 else 1.0

    def waits(self, workers: int) -> float:
        """The share of the time in which more workers are broken than there are spares."""
        load, blocked = workers * self.repair / self.mtbf, 1.0
        for servers in range(1, self.spares + 2):
            blocked = load * blocked / (servers + load * blocked)
        return blocked

    def useful(self, workers: int) -> float:
        """The share of the time that counts: what a job without failures does in it, this one does in all."""
        return self.trains(workers) * (1 - self.waits(workers))


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, MOST))
