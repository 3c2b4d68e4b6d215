"""Searches, by training cells at one rate after another, the lowest at which each strategy's step still holds."""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from .. import cells
from ..launch import WorkersFailed
from ..network.lab import Lab, Loopback
from ..network.rates import bits, show_rate
from ..progress import Part
from ..stats import FLOOR, paired_ratio, round_times
from ..store import Store
from ..training.experiment import experiment_of
from ..training.measure import run_cell

Measure = Callable[[str, Sequence[str]], dict[str, float | None]]  # step / floor of strategies at a rate; None: failed


@dataclass(frozen=True)
class Needed:
    """What was found for one strategy. Rates as they were given; None where there was no such rate."""

    strategy: str
    holds: str | None  # the lowest that was measured to hold
    fails: str | None  # the highest below it that was not
    measured: list[tuple[str, float | None]]  # rate, step / floor, in the order of the measurements


def search(strategies: Sequence[str], ladder: Sequence[str], limit: float, measure: Measure) -> list[Needed]:
    """Down the ladder, which begins with its highest rate, then one bisection for each strategy.

    Strategies that are still in are measured together, so that they are compared at the same moment.
    """
    measured: dict[str, list[tuple[str, float | None]]] = {name: [] for name in strategies}

    def at(rate: str, names: Sequence[str]) -> list[str]:
        ratios = measure(rate, names)
        for name in names:
            measured[name].append((rate, ratios[name]))
        return [name for name in names if _holds(ratios[name], limit)]

    left: Sequence[str] = strategies
    for rate in ladder:
        if left:
            left = at(rate, left)
    brackets: dict[tuple[str, str], list[str]] = {}
    for name in strategies:
        holds, fails = _bracket(measured[name], limit)
        if holds and fails:
            brackets.setdefault((holds, fails), []).append(name)
    for (holds, fails), names in brackets.items():
        at(between(holds, fails), names)
    return [Needed(name, *_bracket(found, limit), found) for name, found in measured.items()]


def between(one: str, other: str) -> str:
    """The rate in the middle, as factors go, in whole kbit/s."""
    return f"{math.sqrt(bits(one) * bits(other)) / 1e3:.0f}kbit"


def _holds(ratio: float | None, limit: float) -> bool:
    return ratio is not None and ratio <= limit


def _bracket(measured: Sequence[tuple[str, float | None]], limit: float) -> tuple[str | None, str | None]:
    holds = min((rate for rate, ratio in measured if _holds(ratio, limit)), key=bits, default=None)
    fails = max((rate for rate, ratio in measured if not _holds(ratio, limit)), key=bits, default=None)
    return holds, fails


def over_floor(cell: dict[str, Any]) -> dict[str, float | None]:
    """Step / compute floor of a training cell's strategies, median over the rounds; None for those that failed.

    Raises WorkersFailed where the floor could not be measured.
    """
    floor, *others = cell["strategies"]
    if floor["failure"]:
        raise WorkersFailed(floor["failure"], f"measuring the compute floor at {show_rate(cell['rate'])}")
    return {
        one["name"]: None if one["failure"] else paired_ratio(round_times(floor), round_times(one)) for one in others
    }


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """What progress calls one cell after the other: every rung, and where the search goes so, a bisection per gap."""
    most = len(given.workers) * (len(given.rates) + min(len(given.strategies), len(given.rates)))
    return (Part(number, most, most=True) for number in itertools.count(1))


def run(
    given: argparse.Namespace, lab: Lab | Loopback, store: Store, counted: Iterator[Part], console: Console
) -> list[Needed]:
    """The search for one number of workers; every rung is stored as soon as it was measured."""

    def measure(rate: str, names: Sequence[str]) -> dict[str, float | None]:
        experiment = experiment_of(given, strategies=[FLOOR, *names])
        where = cells.place(lab.workers, rate, lab.name, ",".join(names), lab.node_size)
        at_rate = partial(cells.run_at, lab, rate, run_cell, experiment)
        cell = store.obtain(where, experiment, next(counted), f"{lab.workers} workers, {rate}", at_rate, console)
        ratios = over_floor(cell)
        floor = statistics.median(round_times(cell["strategies"][0]))
        found = ", ".join(f"{name} {'failed' if ratio is None else f'{ratio:.3f}'}" for name, ratio in ratios.items())
        console.print(f"{show_rate(rate)}: floor {floor:.0f} ms, step / floor: {found}", highlight=False)
        return ratios

    return search(given.strategies, given.rates, given.limit, measure)
