"""Tables of one setting that need several files, or several rates, at once."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..tables import table, value
from ..training import tradeoff
from .contest import Cell, by_rate, kind, median, short_rate


def bounds(cells: Sequence[Cell]) -> Table | None:
    """How much of a step the compute floor, or the communication where that is longer, accounts for: in percent.

    The best bucket size of each kind, by rate; `cells` are of one setting.
    """
    rates = by_rate(cell.rate for cell in cells)
    by_kind: dict[str, dict[str, float | None]] = {}
    for cell in cells:
        for row in cell.best_of_each_kind():
            by_kind.setdefault(kind(row.name), {})[cell.rate] = row.of_bound
    title = f"Share of max(compute, communication) reached, in percent: {cells[0].setting.label}"
    shown = table(title, "strategy", map(short_rate, rates))
    for name, found in by_kind.items():
        if any(found.values()):
            shown.add_row(name, *(value(found.get(rate), ".0f") for rate in rates))
    return shown if shown.rows else None


def price_of_compression(cells: Sequence[Cell]) -> Table | None:
    """What compressing costs per step against the communication it saves; every compressed strategy, losing or not."""
    title = f"Compression: what it costs and what it saves, ms per step: {cells[0].setting.label}"
    columns = [
        "sent of\ndense, %",
        "encode +\ndecode",
        "communication\nsaved",
        "saved -\nspent",
        "step saved\nvs best DDP",
    ]
    shown = table(title, ["rate", "strategy"], columns)
    for cell in cells:
        by_name = {row.name: row for row in cell.finished}
        ddp = next((row.median for row in cell.finished if row.is_best_ddp), None)
        found = [one for one in tradeoff.compressions(cell.data) if one.name in by_name]
        for one in found:
            net = None if one.saved is None or one.spent is None else one.saved - one.spent
            gain = None if ddp is None else ddp - median(by_name[one.name])
            shown.add_row(
                short_rate(cell.rate) if one is found[0] else "",
                one.name,
                "" if not one.dense else f"{100 * one.payload / one.dense:.1f}",
                value(one.spent, ".1f"),
                value(one.saved, ".1f"),
                value(net, _signed),
                value(gain, _signed),
                end_section=one is found[-1],
            )
    return shown if shown.rows else None


def _signed(number: float) -> str:
    return f"[green]{number:+.1f}[/green]" if number > 0 else f"[red]{number:+.1f}[/red]"


def times_to_loss(cell: Cell, curves: Sequence[dict[str, Any]], console: Console) -> None:
    """Steps to a loss times ms per step, at the cell's rate; nothing where the strategies' losses were not measured."""
    tradeoff.show_time_to_loss(cell.data, curves, None, console)
