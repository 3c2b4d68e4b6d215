"""The same table measured twice: how far its numbers are from each other."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..collectives import show as collectives
from ..command import show_size
from ..network.rates import show_rate
from ..records import Source
from .comparison import Cell
from .evidence import Evidence


@dataclass(frozen=True)
class Run:
    """One run of a table, which is the same table as another's where the keys are equal.

    rows: by name, the time it `took`, and its `ratio` to the baseline in the same run, NaN where there is none.
    """

    key: Hashable
    what: str
    source: Source
    rows: pd.DataFrame


@dataclass(frozen=True)
class TwiceMeasured:
    """A table of which there are two runs, and its rows that both have: `took` and `ratio`, second / first."""

    what: str
    first: Source
    second: Source
    rows: pd.DataFrame

    @property
    def off_by(self) -> tuple[float, float]:
        """How far the ratios of the two runs lie from each other in percent, at the median and at worst.

        Where no row has a ratio to a baseline, that of the times themselves.
        """
        by = self.rows.ratio.dropna()
        off = 100 * np.abs((by if len(by) else self.rows.took) - 1)
        return float(off.median()), float(off.max())


def _rows(rows: Iterable[tuple[str, float, float | None]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["name", "took", "ratio"]).astype({"ratio": float}).set_index("name")


def of_training(cells: Iterable[Cell]) -> list[Run]:
    """Rows are strategies, with ms per step; the ratio is to the best DDP."""
    return [
        Run(
            (cell.setting, cell.rate, cell.data["plan"].get("seed")),
            f"{cell.setting.label}, {show_rate(cell.rate)}",
            cell.source,
            _rows((row.name, row.median, row.speedup) for row in cell.rows if row.median is not None),
        )
        for cell in cells
    ]


def of_collectives(sources: Iterable[Source]) -> list[Run]:
    """Rows are methods at sizes, with µs; the ratio is to the backend's all_reduce."""
    return [_collectives_run(source, cell) for source in sources for cell in source.cells]


def _collectives_run(source: Source, cell: dict[str, Any]) -> Run:
    started = f", started by {cell['variant']}" if cell.get("variant") else ""
    what = f"collectives, {cell['workers']} workers, {cell['network']}, {show_rate(cell['rate'])}{started}"
    rows = [
        (f"{show_size(size['bytes'])} {row.name}", row.timing.p50_us, row.speedup)
        for size in cell["sizes"]
        for row in collectives.rows(size, cell["workers"], cell["rate"])
        if not row.failure
    ]
    return Run((source.machine, what, cell["plan"]["dtype"]), what, source, _rows(rows))


def of(evidence: Evidence) -> list[TwiceMeasured]:
    """Each run of all that was read with the one of the same table before it."""
    return twice_measured(of_training(evidence.cells) + of_collectives(evidence.of_benchmark("collectives")))


def twice_measured(runs: Iterable[Run]) -> list[TwiceMeasured]:
    found: list[TwiceMeasured] = []
    before: dict[Hashable, Run] = {}
    for run in sorted(runs, key=lambda run: run.source.when):
        if (earlier := before.get(run.key)) is not None:
            rows = (run.rows / earlier.rows).dropna(subset="took")
            if len(rows):
                found.append(TwiceMeasured(run.what, earlier.source, run.source, rows))
        before[run.key] = run
    return found
