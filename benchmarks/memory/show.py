"""The table of memory. From raw JSON alone."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..command import show_size
from ..tables import alarm, note, table

COLUMNS = {"peak_bytes": "peak", "steady_bytes": "steady", "allocated_bytes": "allocated"}


def name_of(cell: dict[str, Any]) -> str:
    """What a table calls the strategy."""
    return cell["plan"]["strategy"] + ("" if cell["plan"]["views"] else ", gradient_as_bucket_view=False")


def per_byte(cell: dict[str, Any], column: str) -> float | None:
    """One of COLUMNS as bytes per byte of parameters; None where it was not measured."""
    found = cell.get(column)
    return None if found is None else float(found / cell["parameter_bytes"])


def show_one(cell: dict[str, Any], console: Console) -> None:
    """How one strategy has ended."""
    steady = per_byte(cell, "steady_bytes")
    console.print(f"{name_of(cell)}: {cell['failure'] or f'{steady:.2f} bytes per byte'}", highlight=False)


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, then why strategies failed."""
    measured = [cell for cell in cells if not cell["failure"]]
    if measured:
        first = measured[0]
        title = (
            f"Memory of a worker, bytes per byte of parameters ({show_size(first['parameter_bytes'])}) · "
            f"{first['workers']} workers · {first['plan']['optimizer']}"
        )
        made = table(title, "strategy", COLUMNS.values())
        for cell in measured:
            numbers = [per_byte(cell, column) for column in COLUMNS]
            made.add_row(name_of(cell), *("" if one is None else f"{one:.2f}" for one in numbers))
        console.print(made)
    for cell in cells:
        if cell["failure"]:
            alarm(console, f"{name_of(cell)} failed, {cell['failure']}")
    note(
        console,
        "Above what the process took before there was a model. Peak: resident, at most since then. Steady: resident in "
        "the last step. Allocated: of it, what the program holds; the rest the C library keeps for later.",
    )
