"""What the rounds of a measured cell say: how long each strategy took in each, and how surely one is faster."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..stats import FLOOR, finished, slowest_rank

FEWEST = 4  # rounds, of which halves can be compared
AGREE = 0.75  # of the rounds say who is faster, or the two are not told apart


@dataclass(frozen=True)
class Rounds:
    """Seconds of a step. floor: of the compute floor, its median. excess: what a strategy takes beyond the floor of its
    round, by name and round. swing: how much longer the slowest round's floor took than the fastest one's, as a share:
    what else the machine did."""

    floor: float
    excess: dict[str, dict[int, float]]
    swing: float = 0.0

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Rounds:
        """Of a cell of the training benchmark, without strategies that failed."""
        took = {
            one["name"]: {block["round"]: statistics.median(slowest_rank(block["ms"])) / 1e3 for block in one["blocks"]}
            for one in cell["strategies"]
            if finished(one)
        }
        floors = took[FLOOR]
        excess = {
            name: {number: seconds - floors[number] for number, seconds in own.items() if number in floors}
            for name, own in took.items()
        }
        swing = max(floors.values()) / min(floors.values()) - 1
        return cls(statistics.median(floors.values()), excess, swing)

    def seconds(self, name: str, rounds: Collection[int] | None = None) -> float:
        """The floor, and the median of what the strategy takes beyond it, over these rounds or all."""
        own = self.excess[name]
        return self.floor + statistics.median(own[number] for number in own if rounds is None or number in rounds)

    def told_apart(self, one: str, other: str) -> bool:
        """Whether most rounds agree on which of two strategies is faster."""
        first, second = self.excess[one], self.excess[other]
        both = first.keys() & second.keys()
        wins = sum(first[number] < second[number] for number in both)
        return max(wins, len(both) - wins) > AGREE * len(both)

    def halves(self, names: Collection[str], near: float) -> list[bool] | None:
        """For each half of the rounds, whether the fastest strategy of the other half is the fastest in it, or within
        ``near`` of it; None where there are too few rounds."""
        numbers = sorted(set.intersection(*(set(self.excess[name]) for name in names)))
        if len(numbers) < FEWEST:
            return None
        found = []
        for one, other in ((numbers[::2], numbers[1::2]), (numbers[1::2], numbers[::2])):
            chosen = min(names, key=lambda name: self.seconds(name, one))
            times = {name: self.seconds(name, other) for name in names}
            found.append(times[chosen] <= near * min(times.values()))
        return found
