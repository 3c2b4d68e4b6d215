"""Predicted against measured step times, over stored results of the training benchmark.

The profile of each cell is the model's shapes and that cell's own compute floor (`none`); everything else of the lab
comes from the few files that lab.py names, which are not predicted here. A measured time is the floor and the median
over rounds of what a strategy takes beyond the floor of its round. How sure measured first places are is what one half
of the rounds says of the other half.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planner import models
from planner.simulate import step

from ..records import RESULTS
from ..stats import FLOOR
from .lab import FITTED_ON, GLOO, Lab
from .methods import method_of
from .rounds import Rounds

NEAR = 1.03  # a choice that is this close to the best is as good


@dataclass(frozen=True)
class Point:
    """A strategy in a cell; seconds. cell: which one, of which file."""

    file: str
    cell: int
    workers: int
    rate: str
    workload: str
    strategy: str
    measured: float
    predicted: float
    rounds: Rounds = field(repr=False)  # of the cell

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Summary:
    """Of relative errors without their sign. first: the share of cells in which the strategy that is predicted to be
    the fastest is so, or within 3% of it. level: the same, or the rounds do not tell it and the fastest apart. repeats:
    the share of halves of rounds whose first place, or one within 3% of it, the other half of the cell says; None where
    there are none."""

    points: int
    median: float
    p90: float
    cells: int
    first: float
    level: float
    repeats: float | None


def points(results: Path = RESULTS) -> Iterator[Point]:
    """Every strategy that was measured and can be predicted."""
    lab = Lab.read(results)
    for path in sorted(results.glob("training*.json")):
        if path.name in FITTED_ON:
            continue
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            optimizer, workers = cell["plan"]["optimizer"], cell["workers"]
            if optimizer not in ("sgd", "adamw") or cell.get("node_size"):  # the lab's links are a worker's own
                continue
            if all(one["name"] != FLOOR for one in cell["strategies"]):  # the profile of the step
                continue
            workload = cell["plan"].get("workload") or "gpt"
            model, rounds = models.built_in(workload), Rounds.of(cell)
            floor = rounds.floor - lab.barrier(workers)  # which nothing else has
            update = min(lab.update(optimizer, model.parameters), floor / 2)
            profile = model.profile(floor - update, update)
            for name in rounds.excess:
                method = method_of(name, profile)
                if method is None:
                    continue
                network = lab.network(cell["rate"], workers, **({"methods": GLOO} if name == "fsdp2" else {}))
                predicted = step(profile, network, lab.machine(workers), method).seconds
                seconds = rounds.seconds(name)
                yield Point(path.name, number, workers, cell["rate"], workload, name, seconds, predicted, rounds)


def summary(found: Sequence[Point]) -> Summary:
    errors = sorted(abs(point.error) for point in found)
    good, level, halves = 0, 0, list[bool]()
    cells = cells_of(found)
    for own in cells.values():
        chosen = min(own, key=lambda point: point.predicted)
        fastest = min(own, key=lambda point: point.measured)
        is_good = chosen.measured <= NEAR * fastest.measured
        good += is_good
        level += is_good or not chosen.rounds.told_apart(chosen.strategy, fastest.strategy)
        halves += chosen.rounds.halves([point.strategy for point in own], NEAR) or []
    p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    repeats = sum(halves) / len(halves) if halves else None
    median = statistics.median(errors)
    return Summary(len(errors), median, p90, len(cells), good / len(cells), level / len(cells), repeats)


def by(found: Sequence[Point], key: str) -> dict[str, list[Point]]:
    """Those of each value of a field."""
    values = defaultdict(list)
    for point in found:
        values[str(getattr(point, key))].append(point)
    return dict(sorted(values.items()))


def cells_of(found: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """Those of each cell, which is one of a file."""
    own = defaultdict(list)
    for point in found:
        own[point.file, point.cell].append(point)
    return dict(own)
