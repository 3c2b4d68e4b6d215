"""The tables of one cell. From raw JSON alone."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..command import show_size
from ..network.rates import show_rate
from ..stats import SMOOTHED_OVER, finished, round_times, trailing_mean
from ..tables import failures, note, table, value
from ..training.summary import Row, summarise
from .clock import PARTS

PLAIN = "sgd/ddp"  # what the others are compared with


def kind_of(name: str) -> str:
    """A method's name without its learning rate."""
    return name.partition("@")[0]


def slowest(one: dict[str, Any], part: str) -> float | None:
    """Milliseconds a step of the rank that takes longest for one of PARTS; None where nobody looked, or nothing was
    seen, as of packages of others. Of a file that knows no update, rank 0's wall time, which is all that it has."""
    found = (one["breakdown"] or {}).get(part)
    return (max(found, default=None) if isinstance(found, list) else found) or None


def rows(cell: dict[str, Any]) -> list[Row]:
    """A row for each method, compared with SGD on DDP: at the learning rate of those tried at which it is the first at
    SGD's lowest loss."""
    base = min(_plain(cell), key=lambda one: statistics.median(round_times(one)), default=None)
    found: dict[str, list[Row]] = {}
    for row in summarise(cell, goal_of(cell), base):
        found.setdefault(kind_of(row.name), []).append(row)
    return [min(several, key=_rank) for several in found.values()]


def goal_of(cell: dict[str, Any]) -> float | None:
    """SGD's lowest mean training loss on DDP; None without it."""
    return min((min(trailing_mean(one["losses"])) for one in _plain(cell)), default=None)


def _plain(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in cell["strategies"] if finished(one) and kind_of(one["name"]) == PLAIN]


def _rank(row: Row) -> tuple[bool, float, float]:
    loss = float("inf") if row.loss is None else row.loss
    return row.failure is not None, row.seconds_to_loss or float("inf"), loss


def show(cell: dict[str, Any], console: Console) -> None:
    """Step times and losses, then what a preconditioner's step is made of, then why rows failed."""
    found, experiment = rows(cell), cell["plan"]
    _show_steps(found, cell, console)
    failures(console, found)
    shown = {row.name for row in found}
    columns = [*PARTS, "exposed"]
    parts = table(f"{experiment['workload']}: ms of a step, slowest rank", "method", columns)
    for one in cell["strategies"]:
        if one["name"] in shown and one["breakdown"]:
            parts.add_row(one["name"], *(value(slowest(one, part), ".2f") for part in columns))
    if parts.rows:
        console.print(parts)
    note(
        console,
        "Each method at the best of its learning rates (@), if several were tried. over SGD: step time / that of SGD "
        "with momentum on DDP, median over rounds. s to loss: training time until the mean training loss of "
        f"{SMOOTHED_OVER} steps is as low as SGD's lowest on DDP. The second table: CPU time, but of the "
        "preconditioner's communication wall time, of waiting and submitting; preconditioning is what its other parts "
        "leave. Exposed: wall time of the gradients' communication that nothing hides.",
    )


def _show_steps(found: Sequence[Row], cell: dict[str, Any], console: Console) -> None:
    experiment = cell["plan"]
    where = f"{cell['workers']} workers · {show_rate(cell['rate'])} · batch {experiment['batch']} each"
    title = f"{experiment['workload']}: {where}"
    columns = ("ms/step", "over SGD", "sent", "optimizer\nstate", "s to loss", "held-out\nloss")
    made = table(title, "method", columns)
    for row in found:
        made.add_row(
            row.name,
            value(row.median, ".1f") or "[red]failed[/red]",
            value(row.speedup and 1 / row.speedup, ".3f"),
            value(row.sent, show_size),
            value(row.state_bytes, show_size),
            "" if row.failure else value(row.seconds_to_loss, ".2f") or "never",
            value(row.loss, ".4f"),
        )
    console.print(made)
