"""This library's strategies against torch's: families of strategies, the settings they ran in, and which is fastest.

Ours are the strategies of this library; rivals are torch's. Every comparison is made inside one cell of one file,
whose strategies ran in the same rounds, and each side competes with the best that it has: a rival at its best bucket
size too.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..network.rates import bits, show_rate
from ..records import Source
from ..stats import FLOOR, paired_ratio, round_times
from ..training import summary
from ..training.strategies import (
    Auto,
    Compressed,
    DDPHalf,
    DDPPowerSGD,
    Dear,
    FSDP2Half,
    Planned,
    StrategyError,
    parse_strategy,
)

EMULATED = "emulated network"


@dataclass(frozen=True)
class Family:
    """A kind of strategy that people choose between."""

    label: str
    colour: str
    ours: bool


DDP = Family("torch: float32 (DDP, FSDP2)", "#8a8f98", False)
DDP_HALF = Family("torch: 16 bits (DDP's hooks, FSDP2)", "#c9a227", False)
DDP_POWER = Family("torch: DDP with its PowerSGD hook", "#c1664f", False)
DEAR = Family("this library: DeAR, float32", "#2f7fc1", True)
HALF = Family("this library: 16 bits", "#35a6a0", True)
COMPRESSED = Family("this library: compressor", "#5b9f4a", True)
FAMILIES = (DDP, DDP_HALF, DDP_POWER, DEAR, HALF, COMPRESSED)

_HALF_KINDS = ("bf16", "fp16", "exact")
_OF_KIND = (
    ((Dear, Auto, Planned), DEAR),  # the two choose among exact methods
    (DDPPowerSGD, DDP_POWER),
    ((DDPHalf, FSDP2Half), DDP_HALF),
)
_EXACT = (DDP, DEAR)  # they train as plain DDP does: nothing is rounded away


def family(name: str) -> Family:
    """The family of a strategy, none of which is the compute floor."""
    try:
        strategy = parse_strategy(name)
    except StrategyError:  # results of a version that knew others: a rival, so that it flatters nobody
        return DDP
    if isinstance(strategy, Compressed):
        return HALF if strategy.compressor.kind in _HALF_KINDS else COMPRESSED
    return next((found for kind, found in _OF_KIND if isinstance(strategy, kind)), DDP)


def is_exact(name: str) -> bool:
    """Whether training with it is the same training as with plain DDP."""
    return family(name) in _EXACT


def kind(name: str) -> str:
    """The strategy without its bucket or fusion size: ddp:4 is a ddp, acp:8:2 an acp:8."""
    head, _, last = name.rpartition(":")
    try:
        size = parse_strategy(name).bucket_cap_mb
        return head if head and size is not None and float(last) == size else name
    except (StrategyError, ValueError):  # results of a version that knew other strategies; an option that is no number
        return name


def trains_like(name: str, curves: Sequence[dict[str, Any]]) -> str | None:
    """Which of the strategies in the cells of benchmarks.convergence `name` trains like; None if none does.

    Itself, before all. Else the same without bucket size and schedule, which change no sum but its rounding (and, for
    top-k and sign, which elements share a threshold or a scale): dear:sharded:4 as ddp, dear+acp:8:2 as acp:8.
    """
    try:
        strategy = parse_strategy(name)
    except StrategyError:  # results of another version
        return None
    trained = {cell["plan"]["strategy"] for cell in curves}
    plain = str(strategy.compressor) if isinstance(strategy, Compressed) else strategy.same_as
    return next((each for each in (name, plain) if each in trained), None)


class Setting(NamedTuple):
    """What is the same along one row of the map."""

    workload: str
    optimizer: str
    batch: int
    workers: int
    network: str
    machine: str = ""  # named where there are several

    @property
    def label(self) -> str:
        network = "" if self.network == EMULATED else f", {self.network}"
        machine = f", on {self.machine}" if self.machine else ""
        return f"{self.workload}, {self.optimizer}, {self.workers} workers, batch {self.batch}{network}{machine}"

    @property
    def slug(self) -> str:
        """For the names of files."""
        network = "" if self.network == EMULATED else self.network
        words = (self.workload, self.optimizer, f"{self.workers}workers", f"batch{self.batch}", network, self.machine)
        return "-".join(re.sub(r"[^A-Za-z0-9]+", "_", word) for word in words if word)


@dataclass(frozen=True)
class Cell:
    """One cell of the training benchmark: all strategies in the same rounds at one rate."""

    source: Source
    data: dict[str, Any]
    setting: Setting
    rate: str
    rows: tuple[summary.Row, ...]

    @property
    def finished(self) -> list[summary.Row]:
        return [row for row in self.rows if row.median is not None]

    @property
    def floor(self) -> float | None:
        """ms of a step that communicates nothing."""
        return next((row.median for row in self.finished if row.name == FLOOR), None)

    @property
    def is_broken_down(self) -> bool:
        return any(one.get("breakdown") for one in self.data["strategies"])

    def strategy(self, name: str) -> dict[str, Any]:
        return next(one for one in self.data["strategies"] if one["name"] == name)

    def best_of_each_kind(self) -> list[summary.Row]:
        """Of every kind that communicates the bucket size with the smallest median, in the order they were named."""
        best: dict[str, summary.Row] = {}
        for row in self.finished:
            name = kind(row.name)
            if row.name != FLOOR and (name not in best or median(row) < median(best[name])):
                best[name] = row
        return list(best.values())


def median(row: summary.Row) -> float:
    """The median of a row that has one."""
    assert row.median is not None
    return row.median


def cells(sources: Sequence[Source]) -> list[Cell]:
    """Every cell of the training benchmark's files, in their order."""
    several = len({source.machine for source in sources}) > 1
    return [as_cell(source, data, source.machine if several else "") for source in sources for data in source.cells]


def as_cell(source: Source, data: dict[str, Any], machine: str = "") -> Cell:
    """A cell with its rows; `machine` becomes part of the setting."""
    experiment = data["plan"]
    workload = experiment.get("workload", "gpt")
    setting = Setting(workload, experiment["optimizer"], experiment["batch"], data["workers"], data["network"], machine)
    return Cell(source, data, setting, data["rate"], tuple(summary.summarise(data)))


def chosen(all_cells: Sequence[Cell]) -> dict[tuple[Setting, str], Cell]:
    """Of cells measured more than once the one in which most strategies finished; of equals one with a breakdown, then
    the newest."""
    best: dict[tuple[Setting, str], Cell] = {}
    for cell in sorted(all_cells, key=lambda cell: (len(cell.finished), cell.is_broken_down, cell.source.when)):
        best[cell.setting, cell.rate] = cell
    return best


def by_rate(rates: Iterable[str]) -> list[str]:
    """Slowest first, no limit last."""
    return sorted(set(rates), key=bits)


def short_rate(rate: str) -> str:
    """A rate on an axis."""
    return show_rate(rate).replace("no rate limit", "no limit")


TakesPart = Callable[[Cell, str], bool]  # whether a strategy of a cell is among those compared


@dataclass(frozen=True)
class Compared:
    """The fastest strategy of a cell. A ratio above 1: this library's best step is shorter than the best rival's."""

    winner: str
    ours: str | None
    rival: str | None
    ratio: float | None  # best rival's time / our best's, median over rounds
    spread: tuple[float, float] | None  # the quartiles of that ratio over the rounds

    @property
    def tie(self) -> bool:
        """Whether rounds disagree about who is faster: at least a quarter of them on either side."""
        return self.spread is not None and self.spread[0] <= 1 <= self.spread[1]


def compare(cell: Cell, takes_part: TakesPart) -> Compared | None:
    """The best of ours against the best rival, among those that take part; None where none does."""
    rows = [row for row in cell.finished if row.name != FLOOR and takes_part(cell, row.name)]
    if not rows:
        return None
    ours = min((row for row in rows if family(row.name).ours), key=median, default=None)
    rival = min((row for row in rows if not family(row.name).ours), key=median, default=None)
    if not ours or not rival:
        alone = ours or rival
        assert alone is not None
        return Compared(alone.name, alone.name if ours else None, alone.name if rival else None, None, None)
    own, other = (round_times(cell.strategy(row.name)) for row in (ours, rival))
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    ratio = paired_ratio(own, other)
    # The pairs decide, as they do everywhere: medians that lie minutes apart may say otherwise.
    winner_name = ours.name if ratio > 1 else rival.name
    return Compared(winner_name, ours.name, rival.name, ratio, (np.percentile(ratios, 25), np.percentile(ratios, 75)))
