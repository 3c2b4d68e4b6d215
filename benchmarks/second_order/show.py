"""The tables of one cell. From raw JSON alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..command import show_size
from ..network.rates import show_rate
from ..stats import SMOOTHED_OVER, finished, first_at, paired_ratio, round_times, trailing_mean
from ..tables import failures, note, table, value
from .measure import PARTS

PLAIN = "sgd/ddp"  # what the others are compared with


@dataclass(frozen=True)
class Row:
    """One method. Times in ms."""

    name: str
    failure: str | None = None
    median: float | None = None
    over_sgd: float | None = None  # its time / SGD's on DDP, paired by round
    sent: float | None = None
    state_bytes: int | None = None
    seconds_to_loss: float | None = None  # until its smoothed loss is at SGD's lowest
    held_out: float | None = None
    parts: dict[str, float] | None = None


def kind_of(name: str) -> str:
    """A method's name without its learning rate."""
    return name.partition("@")[0]


def rows(cell: dict[str, Any]) -> list[Row]:
    """A row for each method, at the learning rate of those tried at which it is the first at SGD's lowest loss."""
    done = [one for one in cell["strategies"] if finished(one)]
    plain = [one for one in done if kind_of(one["name"]) == PLAIN]
    goal = min((min(trailing_mean(one["losses"])) for one in plain), default=None)
    base = min(plain, key=lambda one: statistics.median(round_times(one)), default=None)
    found: dict[str, list[Row]] = {}
    for one in cell["strategies"]:
        found.setdefault(kind_of(one["name"]), []).append(_row(one, base, goal))
    return [min(several, key=_rank) for several in found.values()]


def _rank(row: Row) -> tuple[bool, float, float]:
    loss = float("inf") if row.held_out is None else row.held_out
    return row.failure is not None, row.seconds_to_loss or float("inf"), loss


def _row(one: dict[str, Any], base: dict[str, Any] | None, goal: float | None) -> Row:
    if not finished(one):
        return Row(one["name"], failure=one["failure"] or "no round was finished")
    times = round_times(one)
    steps = None if goal is None else first_at(trailing_mean(one["losses"]), goal)
    sent = [each for block in one["blocks"] for each in block["sent_bytes_per_step"] if each]
    return Row(
        name=one["name"],
        median=statistics.median(times),
        over_sgd=None if base is None else 1 / paired_ratio(times, round_times(base)),
        sent=statistics.median(sent) if sent else None,
        state_bytes=max(one["optimizer_state_bytes"], default=None),
        seconds_to_loss=None if steps is None else sum(one["clock_ms"][:steps]) / 1e3,
        held_out=one["held_out_loss"],
        parts=one["breakdown"],
    )


def show(cell: dict[str, Any], console: Console) -> None:
    """Step times and losses, then what a preconditioner's step is made of, then why rows failed."""
    found, plan = rows(cell), cell["plan"]
    _show_steps(found, cell, console)
    failures(console, found)  # type: ignore[arg-type]
    parted = [row for row in found if row.parts]
    if parted:
        made = table(f"{plan['workload']}: ms a step of what preconditioning adds", "method", PARTS)
        for row in parted:
            made.add_row(row.name, *(f"{(row.parts or {})[part]:.2f}" for part in PARTS))
        console.print(made)
    note(
        console,
        "Each method at the best of its learning rates (@), if several were tried. over SGD: step time / that of SGD "
        "with momentum on DDP, median over rounds. s to loss: training time until the mean training loss of "
        f"{SMOOTHED_OVER} steps is as low as SGD's lowest on DDP. The second table: rank 0's wall time, of which "
        "communication is waiting and submitting; preconditioning is the rest.",
    )


def _show_steps(found: Sequence[Row], cell: dict[str, Any], console: Console) -> None:
    plan = cell["plan"]
    title = f"{plan['workload']}: {cell['workers']} workers · {show_rate(cell['rate'])} · batch {plan['batch']} each"
    columns = ("ms/step", "over SGD", "sent", "optimizer\nstate", "s to loss", "held-out\nloss")
    made = table(title, "method", columns)
    for row in found:
        made.add_row(
            row.name,
            value(row.median, ".1f") or "[red]failed[/red]",
            value(row.over_sgd, ".3f"),
            value(row.sent, show_size),
            value(row.state_bytes, show_size),
            "" if row.failure else value(row.seconds_to_loss, ".2f") or "never",
            value(row.held_out, ".4f"),
        )
    console.print(made)
