"""Tables for the page: the very ones that the commands print, and those that need several files at once."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import summary
from benchmarks.command import rate_bits
from benchmarks.report.contest import FLOOR, Cell, by_rate, is_exact, kind, short_rate

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
        self.remarks: list[Words] = []  # those before the first table

    def print(self, *objects: Any, style: Any = None, **_: Any) -> None:  # type: ignore[override]
        for one in objects:
            if isinstance(one, Table):
                self.tables.append(html_table(one))
                continue
            remarks = self.tables[-1].remarks if self.tables else self.remarks
            remarks.append(_words(str(one).strip(), str(style or "")))


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
    for start, end in zip(edges, edges[1:], strict=False):
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
        "communication\nsaved, computed",
        "saved /\nspent",
        "step saved\nagainst best DDP",
    ):
        shown.add_column(column, justify="right")
    for cell in sorted(cells, key=lambda cell: rate_bits(cell.rate) or float("inf")):
        strategies = cell.data["strategies"]
        dense = next((one["payload_bytes_per_step"] for one in strategies if summary.is_plain_ddp(one["name"])), 0)
        ddp = next((row.median for row in cell.finished if row.is_best_ddp), None)
        first = True
        for row in cell.finished:
            if row.name == FLOOR or is_exact(row.name) or row.median is None:
                continue
            sent = cell.strategy(row.name)["payload_bytes_per_step"]
            spent = compression_ms(cell.strategy(row.name))
            bits = rate_bits(cell.rate)
            saved = (dense - sent) * 8 / bits * 1e3 if bits else None
            gain = ddp - row.median if ddp is not None else None
            shown.add_row(
                short_rate(cell.rate) if first else "",
                row.name,
                f"{100 * sent / dense:.1f}" if dense else "",
                "" if spent is None else f"{spent:.1f}",
                "" if saved is None else f"{saved:.0f}",
                "" if saved is None or not spent else _signed(saved / spent, 1, f"{saved / spent:.1f}"),
                "" if gain is None else _signed(gain, 0, f"{gain:+.0f}"),
            )
            first = False
        if shown.rows:
            shown.rows[-1].end_section = True
    return shown if shown.rows else None


def _signed(value: float, least: float, text: str) -> str:
    return f"[green]{text}[/green]" if value > least else f"[red]{text}[/red]"


def compression_ms(strategy: dict[str, Any]) -> float | None:
    """Encoding and decoding of one step, mean over ranks and blocks; None where the strategy keeps no account."""
    for keeper in ("compressor", "engine"):  # under DeAR both keep one, of the same work
        accounts = [account for block in strategy["blocks"] for account in block.get(keeper) or [] if account]
        found = [
            account["encode_ms"] + account["decode_ms"]
            for account in accounts
            if account.get("encode_ms") is not None and account.get("decode_ms") is not None
        ]
        if found:
            return sum(found) / len(found)
    return None
