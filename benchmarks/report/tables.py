"""Tables for the page: the very ones that the commands print, and those that need several files at once."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..training import tradeoff
from .contest import Cell, by_rate, kind, median, short_rate

Words = list[tuple[str, str]]  # (text, style) one after the other; a style is "" or a word such as "red"


@dataclass(frozen=True)
class HtmlCell:
    """One cell of a table on the page."""

    words: Words
    justify: str


@dataclass
class HtmlTable:
    """A table as the template draws it."""

    caption: str
    head: list[HtmlCell]
    rows: list[list[HtmlCell]]
    breaks: set[int]  # rows after which a rule is drawn
    remarks: list[Words] = field(default_factory=list)


class PageConsole(Console):
    """Takes what a benchmark's show() prints: so the page has the tables of the commands, and never others."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=200)
        self.tables: list[HtmlTable] = []

    def print(self, *objects: Any, style: Any = None, markup: bool | None = None, **_: Any) -> None:  # type: ignore[override]
        for one in objects:
            if isinstance(one, Table):
                self.tables.append(html_table(one))
                continue
            if not self.tables:  # something is said and no table shown: an empty one carries it
                self.tables.append(HtmlTable("", [], [], set()))
            said = str(one).strip()
            self.tables[-1].remarks.append(
                [(said, str(style or ""))] if markup is False else _words(said, str(style or ""))
            )


def captured(show: Callable[[Console], None]) -> PageConsole:
    """Runs something that prints tables, and returns the console that took them."""
    console = PageConsole()
    show(console)
    return console


def html_table(table: Table) -> HtmlTable:
    """The table's own titles, cells, colours and rules."""
    columns = [list(column.cells) for column in table.columns]
    head = [HtmlCell(_words(column.header), column.justify) for column in table.columns]
    rows = [
        [HtmlCell(_words(cell), column.justify) for cell, column in zip(row, table.columns, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    breaks = {number for number, row in enumerate(table.rows) if row.end_section}
    return HtmlTable(_plain(table.title), head, rows, breaks)


def _plain(text: Any) -> str:
    return "" if text is None else (text.plain if isinstance(text, Text) else Text.from_markup(str(text)).plain)


def _words(cell: Any, style: str = "") -> Words:
    """Text with rich's markup as stretches of one colour each."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    edges = sorted({0, len(text), *(edge for span in text.spans for edge in (span.start, span.end))})
    words = []
    for start, end in pairwise(edges):
        own = [str(span.style) for span in text.spans if span.start <= start and end <= span.end]
        words.append((text.plain[start:end], " ".join(own) or style))
    return words


def bounds(cells: Sequence[Cell]) -> Table | None:
    """How much of a step the compute floor, or the communication where that is longer, accounts for: in percent.

    The best bucket size of each kind, by rate; `cells` are of one setting.
    """
    rates = by_rate(cell.rate for cell in cells)
    by_kind: dict[str, dict[str, tuple[str, float]]] = {}
    for cell in cells:
        for row in cell.best_of_each_kind():
            if row.of_bound is not None:
                by_kind.setdefault(kind(row.name), {})[cell.rate] = (row.name, row.of_bound)
    if not by_kind:
        return None
    shown = Table(title=f"Share of max(compute, communication) reached, in percent: {cells[0].setting.label}")
    shown.add_column("strategy")
    for rate in rates:
        shown.add_column(short_rate(rate), justify="right")
    for name, found in by_kind.items():
        shown.add_row(name, *(f"{found[rate][1]:.0f}" if rate in found else "" for rate in rates))
    return shown


def price_of_compression(cells: Sequence[Cell]) -> Table | None:
    """What compressing costs per step against the communication it saves; every compressed strategy, losing or not."""
    shown = Table(title=f"Compression: what it costs and what it saves, ms per step: {cells[0].setting.label}")
    for column in ("rate", "strategy"):
        shown.add_column(column)
    for column in (
        "sent of\ndense, %",
        "encode +\ndecode",
        "communication\nsaved",
        "saved -\nspent",
        "step saved\nvs best DDP",
    ):
        shown.add_column(column, justify="right")
    for cell in cells:
        by_name = {row.name: row for row in cell.finished}
        ddp = next((row.median for row in cell.finished if row.is_best_ddp), None)
        found = [one for one in tradeoff.compressions(cell.data) if one.name in by_name]
        for number, one in enumerate(found):
            net = None if one.saved is None or one.spent is None else one.saved - one.spent
            gain = None if ddp is None else ddp - median(by_name[one.name])
            shown.add_row(
                short_rate(cell.rate) if number == 0 else "",
                one.name,
                "" if not one.dense else f"{100 * one.payload / one.dense:.1f}",
                "" if one.spent is None else f"{one.spent:.1f}",
                "" if one.saved is None else f"{one.saved:.1f}",
                _signed(net),
                _signed(gain),
                end_section=number == len(found) - 1,
            )
    return shown if shown.rows else None


def _signed(value: float | None) -> str:
    if value is None:
        return ""
    return f"[green]{value:+.1f}[/green]" if value > 0 else f"[red]{value:+.1f}[/red]"


def times_to_loss(cell: Cell, curves: Sequence[dict[str, Any]]) -> list[HtmlTable]:
    """Steps to a loss times ms per step, at the cell's rate; none where the strategies' losses were not measured."""
    found = captured(lambda console: tradeoff.show_time_to_loss(cell.data, curves, None, console)).tables
    for table in found:
        table.caption = f"{short_rate(cell.rate)}: {table.caption}"
    return found
