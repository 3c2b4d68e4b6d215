"""The bandwidth a strategy needs to stay close to its compute floor: python -m benchmarks.bandwidth.

Down a ladder of rates, each strategy drops out at the first where its step takes more than --limit times that of no
communication, measured in turns with it; then one more rate, between the last that held and the first that did not.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import cells, records, stats
from benchmarks.command import UNLIMITED, Parser, fail, number, rate_bits, show_rate, terminal
from benchmarks.launch import WorkersFailed
from benchmarks.network import Network, open_network
from benchmarks.strategies import StrategyError, parse_strategies
from benchmarks.summary import round_times
from benchmarks.training import plan_of, plan_options, run_cell

LADDER = ["10gbit", "5gbit", "2500mbit", "1gbit", "500mbit", "250mbit", "125mbit", "62mbit"]
STRATEGIES = "ddp:2,ddp+fp16:1,ddp+fp16:4,dear,bf16:4,dear+acp:4,acp:4,topk:0.01,sign"
FLOOR = "none"

Measure = Callable[[str, Sequence[str]], dict[str, float | None]]  # step / floor of strategies at a rate; None: failed


@dataclass(frozen=True)
class Needed:
    """What was found for one strategy. Rates as they were given; None where there was no such rate."""

    strategy: str
    holds: str | None  # the lowest that was measured to hold
    fails: str | None  # the highest below it that was not
    measured: list[tuple[str, float | None]]  # rate, step / floor, in the order of the measurements


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.bandwidth", description=__doc__.splitlines()[0] if __doc__ else None)
    plan_options(parser, strategies=STRATEGIES, rounds=5, warmup=1, steps=4)
    limit = partial(number, above=1)
    parser.add_argument("--limit", type=limit, default=1.15, help="step / compute floor that still holds")
    parser.set_defaults(rates=LADDER)
    given = parser.parse_args()
    try:
        given.strategies = [one.name for one in parse_strategies(given.strategies) if one.name != FLOOR]
    except StrategyError as error:
        parser.error(str(error))
    if UNLIMITED in given.rates:
        parser.error("a ladder of rates has no rung without a limit")
    given.rates.sort(key=bits, reverse=True)
    return given


def bits(rate: str) -> float:
    """Bits per second of a limited rate."""
    return rate_bits(rate) or math.inf


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
        one["name"]: None if one["failure"] else stats.paired_ratio(round_times(floor), round_times(one))
        for one in others
    }


def numbered(given: argparse.Namespace) -> Iterator[str]:
    """What progress calls one cell after the other: every rung, and where the search goes so, a bisection per gap."""
    most = len(given.workers) * (len(given.rates) + min(len(given.strategies), len(given.rates)))
    return (f"cell {number} of at most {most}" for number in itertools.count(1))


def run(
    given: argparse.Namespace, network: Network, kept: cells.Kept, titles: Iterator[str], console: Console
) -> list[Needed]:
    """The search for one number of workers; every rung is kept as soon as it was measured."""
    workers = network.lab.workers

    def measure(rate: str, names: Sequence[str]) -> dict[str, float | None]:
        own = replace(plan_of(given), strategies=[FLOOR, *names])
        variant = ",".join(names)
        where = cells.place(workers, rate, network.name, variant)
        title = f"{next(titles)}: {workers} workers, {rate}"
        cell = cells.obtain(kept, where, own, title, partial(cells.run_at, rate, run_cell, network, own), console)
        ratios = over_floor(cell)
        floor = statistics.median(round_times(cell["strategies"][0]))
        found = ", ".join(f"{name} {'failed' if ratio is None else f'{ratio:.3f}'}" for name, ratio in ratios.items())
        console.print(f"{show_rate(rate)}: floor {floor:.0f} ms, step / floor: {found}", highlight=False)
        return ratios

    return search(given.strategies, given.rates, given.limit, measure)


def show(workers: int, limit: float, needed: Sequence[Needed], console: Console) -> None:
    """The table, the strategy that needs least first."""
    title = f"Bandwidth needed for a step within {limit:g} × its compute floor · {workers} workers"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for column in ("holds at", "step / floor", "not at", "step / floor"):
        table.add_column(column, justify="right")
    for one in sorted(needed, key=lambda one: bits(one.holds) if one.holds else math.inf):
        ratios = dict(one.measured)

        def ratio(rate: str | None, ratios: dict[str, float | None] = ratios) -> str:
            found = ratios.get(rate) if rate else None
            return ("failed" if rate else "") if found is None else f"{found:.3f}"

        holds = show_rate(one.holds) if one.holds else "none of these"
        table.add_row(
            one.strategy, holds, ratio(one.holds), show_rate(one.fails) if one.fails else "", ratio(one.fails)
        )
    console.print(table)


def main() -> None:
    given, console = arguments(), terminal()
    titles = numbered(given)
    header = records.header("bandwidth", {"workers": given.workers, "rates": given.rates, "limit": given.limit})
    with cells.ended_by_a_sentence(given.json):
        kept = cells.Kept.open(header, given.json, given.resume)
        kept.payload["needed"] = []
        for workers in given.workers:
            with open_network(given.network, workers) as network:
                if not network.lab.emulated:
                    fail("A ladder of rates needs the emulated network, which needs root and iproute2.")
                needed = run(given, network, kept, titles, console)
            kept.payload["needed"] += [{"workers": workers, **asdict(one)} for one in needed]
            if given.json:
                records.write(given.json, kept.payload)
            show(workers, given.limit, needed, console)
    if given.json:
        console.print(f"Raw times: {given.json}", highlight=False)


if __name__ == "__main__":
    main()
