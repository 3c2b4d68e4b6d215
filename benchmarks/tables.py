"""How every table looks, and the few words between tables."""

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def table(title: str | None, names: str | Iterable[str], columns: Iterable[str], padding: int = 1) -> Table:
    """An empty table: columns of names on the left, then of numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0))
    for name in [names] if isinstance(names, str) else names:
        made.add_column(name, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def value(number: float | None, form: str | Callable[[float], str]) -> str:
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
