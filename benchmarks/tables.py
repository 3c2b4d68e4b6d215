"""How every table looks, and the few words between tables."""

from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

BUSY = 0.05  # share of the CPU taken by others from which on a table says so


def table(title: str | None, names: str | Iterable[str], columns: Iterable[str], padding: int = 1) -> Table:
    """An empty table: columns of names on the left, then of numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0))
    for name in [names] if isinstance(names, str) else names:
        made.add_column(name, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def value(number: Any, form: str | Callable[[Any], str]) -> str:
    """A cell; empty where there is no number."""
    if number is None:
        return ""
    return form(number) if callable(form) else format(number, form)


def note(console: Console, text: str) -> None:
    """How to read the table above."""
    console.print(text + "\n", style="dim", highlight=False)


def alarm(console: Console, text: str) -> None:
    """What went wrong."""
    console.print(text, style="red", highlight=False, markup=False)


def failures(console: Console, rows: Iterable[Any]) -> None:
    """Why rows failed."""
    for row in rows:
        if row.failure:
            alarm(console, f"{row.name} failed: {row.failure}")


def warn_of_others(console: Console, share: float | None) -> None:
    """Says so where other programs took much of the CPU."""
    if share is not None and share > BUSY:
        taken = f"Other programs took {100 * share:.0f}% of this machine's CPU meanwhile"
        console.print(f"{taken}: repeat this on a quiet machine.", style="yellow")
