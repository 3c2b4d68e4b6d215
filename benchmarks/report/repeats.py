"""The same table measured twice: how far its numbers are from each other."""

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..collectives import show as collectives_table
from ..command import show_size
from ..network.rates import show_rate
from ..records import Source
from .contest import Cell

WITHIN = 5  # percent: what two runs of one table may differ by, at the median


@dataclass(frozen=True)
class Entry:
    """A row of a table, in whatever unit the table has: what it took, and its ratio to the baseline in the same run."""

    name: str
    took: float
    ratio: float | None


@dataclass(frozen=True)
class Repeat:
    """A row measured twice."""

    first: Entry
    second: Entry

    @property
    def took(self) -> float:
        return self.second.took / self.first.took

    @property
    def ratio(self) -> float | None:
        if self.first.ratio is None or self.second.ratio is None:
            return None
        return self.second.ratio / self.first.ratio


@dataclass(frozen=True)
class TwiceMeasured:
    """A table of which there are two runs."""

    what: str
    unit: str
    first: Source
    second: Source
    pairs: list[Repeat]

    @property
    def off_by(self) -> tuple[float, float]:
        """How far the ratios of the two runs lie from each other in percent, at the median and at worst.

        Where no row has a ratio to a baseline, that of the times themselves.
        """
        ratios = [pair.ratio for pair in self.pairs if pair.ratio is not None] or [pair.took for pair in self.pairs]
        off = [100 * abs(ratio - 1) for ratio in ratios]
        return statistics.median(off), max(off)


@dataclass(frozen=True)
class Run:
    """One run of a table, which is the same table as another's where the keys are equal."""

    key: Hashable
    what: str
    unit: str
    source: Source
    entries: list[Entry]


def of_training(cells: Iterable[Cell]) -> list[Run]:
    """Rows are strategies, in ms per step; the ratio is to the best DDP."""
    return [
        Run(
            (cell.setting, cell.rate, cell.data["plan"].get("seed")),
            f"{cell.setting.label}, {show_rate(cell.rate)}",
            "ms/step",
            cell.source,
            [Entry(row.name, row.median, row.speedup) for row in cell.rows if row.median is not None],
        )
        for cell in cells
    ]


def of_collectives(sources: Iterable[Source]) -> list[Run]:
    """Rows are methods at sizes, in µs; the ratio is to the backend's all_reduce."""
    return [_collectives_run(source, cell) for source in sources for cell in source.cells]


def _collectives_run(source: Source, cell: dict[str, Any]) -> Run:
    entries = []
    for size in cell["sizes"]:
        exact = collectives_table.rows(size, cell["workers"], cell["rate"])
        times = [(row.name, row.timing.p50_us, row.speedup) for row in exact if not row.failure]
        lossy = [row for row in collectives_table.compressor_rows(size) if not row.failure]
        times += [(row.name, row.p50_us, row.speedup) for row in lossy]
        entries += [Entry(f"{show_size(size['bytes'])} {name}", us, speedup) for name, us, speedup in times]
    started = f", started by {cell['variant']}" if cell.get("variant") else ""
    what = f"collectives, {cell['workers']} workers, {cell['network']}, {show_rate(cell['rate'])}{started}"
    return Run((source.machine, what, cell["plan"]["dtype"]), what, "µs", source, entries)


def twice_measured(runs: Sequence[Run]) -> list[TwiceMeasured]:
    """Each run with the one of the same table before it."""
    found: list[TwiceMeasured] = []
    before: dict[Hashable, Run] = {}
    for run in sorted(runs, key=lambda run: run.source.when):
        earlier = before.get(run.key)
        if earlier is not None:
            entries = {entry.name: entry for entry in earlier.entries}
            pairs = [Repeat(entries[entry.name], entry) for entry in run.entries if entry.name in entries]
            if pairs:
                found.append(TwiceMeasured(run.what, run.unit, earlier.source, run.source, pairs))
        before[run.key] = run
    return found


def table(one: TwiceMeasured) -> Table:
    """Both runs side by side."""
    middle, worst = one.off_by
    verdict = "within" if middle <= WITHIN else "NOT within"
    shown = Table(
        title=f"{one.what}: the two runs' ratios differ by {middle:.1f}% at the median, {worst:.1f}% at worst "
        f"({verdict} {WITHIN}% at the median)"
    )
    shown.add_column("row")
    for column in (
        f"{one.unit}\nfirst",
        f"{one.unit}\nagain",
        "again /\nfirst",
        "×\nfirst",
        "×\nagain",
        "× again /\nfirst",
    ):
        shown.add_column(column, justify="right")
    for pair in one.pairs:
        ratios = ["", "", ""]
        if pair.ratio is not None:
            ratios = [f"{pair.first.ratio:.3f}", f"{pair.second.ratio:.3f}", _marked(pair.ratio)]
        shown.add_row(pair.first.name, f"{pair.first.took:.1f}", f"{pair.second.took:.1f}", _marked(pair.took), *ratios)
    return shown


def _marked(ratio: float) -> str:
    return f"{ratio:.3f}" if abs(ratio - 1) <= WITHIN / 100 else f"[yellow]{ratio:.3f}[/yellow]"
