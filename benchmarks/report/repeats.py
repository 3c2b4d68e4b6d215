"""The same table measured twice: how far its numbers are from each other."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from .. import tables
from ..collectives import show as collectives
from ..command import show_size
from ..network.rates import show_rate
from ..records import Source
from .comparison import Cell
from .evidence import Evidence

WITHIN = 5  # percent: what two runs of one table may differ by, at the median


@dataclass(frozen=True)
class Run:
    """One run of a table, which is the same table as another's where the keys are equal.

    rows: by name, `took` in `unit`, and `ratio` to the baseline in the same run, NaN where there is none.
    """

    key: Hashable
    what: str
    unit: str
    source: Source
    rows: pd.DataFrame


@dataclass(frozen=True)
class TwiceMeasured:
    """A table of which there are two runs, and its rows that both have: first, again, and again / first."""

    what: str
    unit: str
    first: Source
    second: Source
    rows: pd.DataFrame  # took, took_again, took_by, ratio, ratio_again, ratio_by

    @property
    def off_by(self) -> tuple[float, float]:
        """How far the ratios of the two runs lie from each other in percent, at the median and at worst.

        Where no row has a ratio to a baseline, that of the times themselves.
        """
        by = self.rows.ratio_by.dropna()
        off = 100 * np.abs((by if len(by) else self.rows.took_by) - 1)
        return float(off.median()), float(off.max())


def _rows(rows: Iterable[tuple[str, float, float | None]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["name", "took", "ratio"]).astype({"ratio": float}).set_index("name")


def of_training(cells: Iterable[Cell]) -> list[Run]:
    """Rows are strategies, in ms per step; the ratio is to the best DDP."""
    return [
        Run(
            (cell.setting, cell.rate, cell.data["plan"].get("seed")),
            f"{cell.setting.label}, {show_rate(cell.rate)}",
            "ms/step",
            cell.source,
            _rows((row.name, row.median, row.speedup) for row in cell.rows if row.median is not None),
        )
        for cell in cells
    ]


def of_collectives(sources: Iterable[Source]) -> list[Run]:
    """Rows are methods at sizes, in µs; the ratio is to the backend's all_reduce."""
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
    return Run((source.machine, what, cell["plan"]["dtype"]), what, "µs", source, _rows(rows))


def of(evidence: Evidence) -> list[TwiceMeasured]:
    """Each run of all that was read with the one of the same table before it."""
    return twice_measured(of_training(evidence.cells) + of_collectives(evidence.of_benchmark("collectives")))


def twice_measured(runs: Iterable[Run]) -> list[TwiceMeasured]:
    found: list[TwiceMeasured] = []
    before: dict[Hashable, Run] = {}
    for run in sorted(runs, key=lambda run: run.source.when):
        if (earlier := before.get(run.key)) is not None:
            rows = earlier.rows.join(run.rows.add_suffix("_again"), how="inner")
            for column in ("took", "ratio"):
                rows[f"{column}_by"] = rows[f"{column}_again"] / rows[column]
            if len(rows):
                found.append(TwiceMeasured(run.what, run.unit, earlier.source, run.source, rows))
        before[run.key] = run
    return found


def table(one: TwiceMeasured) -> Table:
    """Both runs side by side."""
    middle, worst = one.off_by
    agree = "within" if middle <= WITHIN else "NOT within"
    title = (
        f"{one.what}: the two runs' ratios differ by {middle:.1f}% at the median, {worst:.1f}% at worst "
        f"({agree} {WITHIN}% at the median)"
    )
    columns = [f"{one.unit}\nfirst", f"{one.unit}\nagain", "again /\nfirst", "×\nfirst", "×\nagain", "× again /\nfirst"]
    shown = tables.table(title, "row", columns)
    for name, row in one.rows.iterrows():
        shown.add_row(
            str(name),
            *(tables.value(row[at], ".1f") for at in ("took", "took_again")),
            _marked(row.took_by),
            *(tables.value(row[at], ".3f") if row.ratio_by == row.ratio_by else "" for at in ("ratio", "ratio_again")),
            _marked(row.ratio_by),
        )
    return shown


def _marked(ratio: float) -> str:
    if np.isnan(ratio):
        return ""
    return f"{ratio:.3f}" if abs(ratio - 1) <= WITHIN / 100 else f"[yellow]{ratio:.3f}[/yellow]"
