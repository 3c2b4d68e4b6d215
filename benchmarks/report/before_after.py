"""The table of two commits whose runs took turns on one machine, for the results pages."""

import statistics
from collections import defaultdict
from collections.abc import Iterable

from ..network.rates import show_rate
from .comparison import Cell, by_rate
from .markdown import extent, table


def turns_table(cells: Iterable[Cell], before: str) -> str:
    """A row for each rate and strategy: medians of the runs before, whose files' names begin so, and of the others."""
    found: defaultdict[tuple[str, str], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for cell in cells:
        now = not cell.source.name.startswith(before)
        for row in cell.finished:
            if row.median is not None:
                found[cell.rate, row.name][now].append(row.median)
    rows = []
    for rate in by_rate(rate for rate, _ in found):
        for (own, name), (old, new) in found.items():
            if own == rate:
                change = statistics.median(new) / statistics.median(old) - 1
                rows.append([show_rate(rate), name, *(_times(each) for each in (old, new)), f"{100 * change:+.1f}%"])
    return table(["link", "strategy", "before, ms", "now, ms", "now to before"], rows)


def _times(runs: list[float]) -> str:
    return f"{statistics.median(runs):.1f} ({extent(runs, '.1f')})"
