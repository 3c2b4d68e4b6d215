"""What the collectives benchmark wrote, as the description of a cluster: one cell's fitted lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BENCHMARK = "collectives"
#: Methods of the benchmark that measure a phase; the first one that a cell has counts.
METHODS = {
    "all_reduce": ("all_reduce",),
    "reduce_scatter": ("ring-rs", "native-rs"),
    "all_gather": ("ring-ag", "native-ag"),
}


def is_one(found: Any) -> bool:
    return isinstance(found, dict) and found.get("benchmark") == BENCHMARK


def description(found: Mapping[str, Any], cell: int | None = None) -> dict[str, Any]:
    """As :func:`planner.cluster.described` takes it. cell: its number, from 1; not needed where one alone will do.

    Raises ValueError, of one sentence.
    """
    cells = found.get("cells")
    if not isinstance(cells, list):
        raise ValueError("it has no cells, as python -m benchmarks.collectives --json writes them.")
    lines = {number: own for number, one in enumerate(cells, 1) if (own := _lines(one))}
    if not lines:
        raise ValueError("no cell of it has lines of an all-reduce, or of both its halves: measure two sizes or more.")
    listed = ", ".join(f"{number} ({_named(cells[number - 1])})" for number in lines)
    if cell is None and len(lines) > 1:
        raise ValueError(f"it has several cells: choose one by --cell, of {listed}.")
    number = next(iter(lines)) if cell is None else cell
    if number not in lines:
        raise ValueError(f"it has no cell {number} with lines: choose one of {listed}.")
    return {"nodes": cells[number - 1].get("workers"), "collectives": lines[number]}


def _lines(cell: Any) -> dict[str, dict[str, Any]] | None:
    fits = cell.get("fits") if isinstance(cell, dict) else None
    if not isinstance(fits, dict):
        return None
    lines = {
        phase: fits[name]
        for phase, names in METHODS.items()
        if (name := next((each for each in names if each in fits), None))
    }
    return lines if "all_reduce" in lines or len(lines) == len(METHODS) - 1 else None


def _named(cell: Mapping[str, Any]) -> str:
    return f"{cell.get('workers')} workers, {cell.get('rate')}"
