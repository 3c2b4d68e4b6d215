"""What two levels gain: each strategy that was also timed with @node, against itself in one level. From raw JSON."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from .. import tables
from ..command import show_size
from ..stats import paired_ratio, round_times
from ..tables import note, value
from .summary import Row, summarise


@dataclass(frozen=True)
class Pair:
    """A strategy in one level and in two, in the same rounds."""

    flat: Row
    levels: Row
    gain: float  # time in one level / in two, median over rounds
    spread: tuple[float, float]  # its quartiles

    @property
    def bytes_gain(self) -> float | None:
        """Bytes through the port in one level / in two."""
        return self.flat.sent / self.levels.sent if self.flat.sent and self.levels.sent else None

    @property
    def most(self) -> float | None:
        """What `gain` would be if nothing but the port cost time, and one level took the time that it took: a step in
        two levels is no shorter than its bytes take, nor than the compute floor."""
        bound = self.levels.of_bound
        return None if bound is None else self.gain * 100 / bound


def pairs(cell: dict[str, Any]) -> list[Pair]:
    """Of the strategies of a cell, those that finished in both forms, in the order of the second."""
    rows = {row.name: row for row in summarise(cell) if row.median is not None}
    times = {one["name"]: round_times(one) for one in cell["strategies"] if one["name"] in rows}
    found = []
    for name, row in rows.items():
        one_level, levels, _ = name.partition("@")
        if levels and one_level in rows:
            ratios = [flat / ours for flat, ours in zip(times[one_level], times[name], strict=True)]
            gain = paired_ratio(times[name], times[one_level])
            low, high = np.percentile(ratios, (25, 75))
            found.append(Pair(rows[one_level], row, gain, (float(low), float(high))))
    return found


def show(cell: dict[str, Any], console: Console) -> None:
    """The table; nothing for a cell without such pairs."""
    found = pairs(cell)
    if not found:
        return
    columns = ["one level\nms/step", "two levels\nms/step", "times\nfaster", "at\nmost", "sent by\none level"]
    columns += ["sent by\ntwo", "times\nless", "CPU ms\none level", "CPU ms\ntwo"]
    shown = tables.table("Two levels against one", "strategy", columns)
    for pair in found:
        shown.add_row(
            pair.flat.name,
            *(value(row.median, ".1f") for row in (pair.flat, pair.levels)),
            f"{pair.gain:.2f}",
            value(pair.most, ".2f"),
            *(value(row.sent, show_size) for row in (pair.flat, pair.levels)),
            value(pair.bytes_gain, ".2f"),
            *(value(row.cpu, ".0f") for row in (pair.flat, pair.levels)),
        )
    console.print(shown)
    note(
        console,
        "times faster: median over rounds. sent: by all workers of a node through its port, per step. at most: if a "
        "step in two levels took no longer than its bytes through the port, or than the compute floor (none).",
    )
