"""The table of memory for the results pages."""

from collections.abc import Iterable

from ..memory.show import COLUMNS, name_of, per_byte
from ..records import Source
from .markdown import table


def memory_table(sources: Iterable[Source]) -> str:
    """One row for each strategy that was measured: bytes per byte of parameters."""
    rows = [
        [f"`{name_of(cell)}`", *("" if one is None else f"{one:.2f}" for one in (per_byte(cell, c) for c in COLUMNS))]
        for source in sources
        for cell in source.cells
        if not cell["failure"]
    ]
    return table(["strategy", *COLUMNS.values()], rows)
