"""The table of two levels against one, for the results pages: cells whose workers share nodes."""

from collections.abc import Iterable

from ..command import show_size
from ..network.rates import show_rate
from ..training.levels import pairs
from .comparison import Cell
from .markdown import number, table


def is_of_nodes(cell: Cell) -> bool:
    """Whether several workers shared a port: such a cell is compared with none of one worker a port."""
    return "node_size" in cell.data


def pairs_table(cells: Iterable[Cell]) -> str:
    """A row for each strategy that ran in both forms."""
    rows = []
    for cell in cells:
        size, experiment = cell.data["node_size"], cell.data["plan"]
        where = f"{cell.setting.workers // size} nodes of {size}, {show_rate(cell.rate)}, {experiment['workload']}"
        where += f", batch {experiment['batch']}, floor {number(cell.floor)} ms"
        for pair in pairs(cell.data):
            low, high = pair.spread
            both = (pair.flat, pair.levels)
            rows.append(
                [
                    where,
                    pair.flat.name,
                    *(number(row.median) for row in both),
                    f"{pair.gain:.2f}× ({low:.2f}–{high:.2f})",
                    f"{pair.most:.2f}×" if pair.most else "",
                    *(show_size(row.sent) if row.sent else "" for row in both),
                    *(number(row.cpu) for row in both),
                ]
            )
    head = ["nodes", "strategy", "one level", "two levels", "two levels against one", "at most"]
    return table([*head, "port, one level", "port, two", "CPU ms, one level", "CPU ms, two"], rows)
