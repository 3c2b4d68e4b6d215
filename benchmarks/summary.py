"""Turns the raw JSON of the training benchmark into rows and a table. Pure, so the report can use it too."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from .command import show_size
from .network.rates import parse_rate, show_rate
from .stats import SMOOTHED_OVER, first_at, paired_ratio, share_of_others, slowest_rank, trailing_mean

BUSY = 0.05  # share of the CPU taken by others from which on a table says so


@dataclass(frozen=True)
class Row:
    """One strategy in one cell. Times in ms per step; None where there was nothing to compare with."""

    name: str
    failure: str | None = None
    median: float | None = None  # of the rounds' medians
    p10: float = 0.0  # of all timed steps
    p90: float = 0.0
    speedup: float | None = None  # best plain DDP's time / ours, paired by round
    exposed: float | None = None  # ours - compute floor, paired by round
    cpu: float | None = None  # process CPU time, mean over ranks
    sent: float | None = None  # bytes that left one worker's interface, measured
    computed_communication: float | None = None  # payload bytes / rate
    of_bound: float | None = None  # max(floor, computed communication) / ours, in percent
    loss: float | None = None  # held-out, after all steps
    seconds_to_loss: float | None = None  # of its own training time, until its smoothed loss is at the target
    state_bytes: int | None = None  # of the rank with most
    is_best_ddp: bool = False


def round_times(strategy: dict[str, Any]) -> list[float]:
    """Median step of each round, in ms, a step being as long as its slowest rank."""
    return [statistics.median(slowest_rank(block["ms"])) for block in strategy["blocks"]]


def is_plain_ddp(name: str) -> bool:
    """Uncompressed DDP at any bucket size: the rivals whose best is the baseline."""
    return name == "ddp" or name.startswith("ddp:")


def best_ddp(strategies: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The plain DDP with the smallest median: picking it by the same numbers favours the rival, not us."""
    candidates = [one for one in strategies if is_plain_ddp(one["name"]) and _finished(one)]
    return min(candidates, key=lambda one: statistics.median(round_times(one)), default=None)


def _finished(strategy: dict[str, Any]) -> bool:
    return not strategy["failure"] and bool(strategy["blocks"])


def taken_by_others(cell: dict[str, Any]) -> float | None:
    """Share of the machine's CPU that programs other than the workers took while steps were timed, 0 to 1."""
    machine = workers = wall = 0.0
    for block in (block for one in cell["strategies"] for block in one["blocks"]):
        ranks = block.get("user_s") or [None]
        if None in ranks:
            return None
        machine += ranks[0][0]
        workers += sum(own for _, own in ranks)
        wall += sum(slowest_rank(block["ms"])) / 1e3
    return share_of_others(machine, workers, wall, cell.get("cpus"))


def warn_of_others(share: float | None, console: Console) -> None:
    """Says so where other programs took much of the CPU."""
    if share is not None and share > BUSY:
        console.print(
            f"Other programs took {100 * share:.0f}% of this machine's CPU meanwhile: repeat this on a quiet machine.",
            style="yellow",
        )


def summarise(cell: dict[str, Any], target: float | None = None) -> list[Row]:
    """One row per strategy of a cell, failed ones included. A target loss of None takes the cell's own."""
    strategies = cell["strategies"]
    best = best_ddp(strategies)
    floor = next((one for one in strategies if one["name"] == "none" and _finished(one)), None)
    target = target_loss(cell) if target is None else target
    return [_row(one, best, floor, parse_rate(cell["rate"]), target) for one in strategies]


def target_loss(cell: dict[str, Any]) -> float | None:
    """The lowest smoothed training loss that all strategies of a cell reach; None where losses were not kept.

    The compute floor is left out: its ranks train apart.
    """
    curves = [one.get("losses") for one in cell["strategies"] if _finished(one) and one["name"] != "none"]
    return max((min(trailing_mean(curve)) for curve in curves if curve), default=None)


def _seconds_to(target: float, strategy: dict[str, Any]) -> float | None:
    """How long it trained, warm-up steps included, until its smoothed loss was at the target; None if it never was."""
    steps = first_at(trailing_mean(strategy["losses"]), target)
    return None if steps is None else sum(strategy["clock_ms"][:steps]) / 1e3


def _row(
    strategy: dict[str, Any],
    best: dict[str, Any] | None,
    floor: dict[str, Any] | None,
    bits: float | None,
    target: float | None,
) -> Row:
    if not _finished(strategy):
        return Row(strategy["name"], failure=strategy["failure"] or "no round was finished")
    rounds = round_times(strategy)
    median = statistics.median(rounds)
    steps = [ms for block in strategy["blocks"] for ms in slowest_rank(block["ms"])]
    sent = [each for block in strategy["blocks"] for each in block["sent_bytes_per_step"] if each]
    communication = strategy["payload_bytes_per_step"] * 8 / bits * 1e3 if bits else None
    exposed = of_bound = None
    if floor is not None and strategy is not floor:
        floor_rounds = round_times(floor)
        exposed = statistics.median(ours - least for ours, least in zip(rounds, floor_rounds, strict=True))
        of_bound = 100 * max(statistics.median(floor_rounds), communication or 0) / median
    return Row(
        name=strategy["name"],
        median=median,
        p10=np.percentile(steps, 10),
        p90=np.percentile(steps, 90),
        speedup=paired_ratio(rounds, round_times(best)) if best else None,
        exposed=exposed,
        cpu=statistics.mean(cpu for block in strategy["blocks"] for cpu in block["cpu_ms_per_step"]),
        sent=statistics.median(sent) if sent else None,
        computed_communication=communication,
        of_bound=of_bound,
        loss=strategy["held_out_loss"],
        seconds_to_loss=None if target is None or strategy["name"] == "none" else _seconds_to(target, strategy),
        state_bytes=max(strategy["optimizer_state_bytes"], default=None),
        is_best_ddp=strategy is best,
    )


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _variant(cell: dict[str, Any]) -> str:
    return f" · {cell['variant']}" if cell.get("variant") else ""


def table(cell: dict[str, Any]) -> Table:
    """The table a person reads, for one cell."""
    plan = cell["plan"]
    shown = Table(
        title=f"{show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']} · {plan['optimizer']} · "
        f"{plan['rounds']} rounds of {plan['steps']} steps{_variant(cell)}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    target = target_loss(cell)
    columns = ["ms/step\nmedian", "p10-p90", "× best\nDDP", "exposed\nms", "CPU ms", "sent", "% of\nbound"]
    columns += [] if target is None else [f"s to loss\n{target:.2f}"]
    shown.add_column("strategy", no_wrap=True)
    for column in [*columns, "held-out\nloss", "optimizer\nstate"]:
        shown.add_column(column, justify="right")
    for row in summarise(cell):
        if row.failure:
            shown.add_row(row.name, "[red]failed[/red]")
            continue
        shown.add_row(
            f"{row.name} *" if row.is_best_ddp else row.name,
            _show(row.median, ".1f"),
            f"{row.p10:.0f}-{row.p90:.0f}",
            _show(row.speedup, ".3f"),
            _show(row.exposed, ".1f"),
            _show(row.cpu, ".0f"),
            show_size(row.sent) if row.sent else "",
            _show(row.of_bound, ".0f"),
            *([] if target is None else [_show(row.seconds_to_loss, ".1f")]),
            _show(row.loss, ".4f"),
            show_size(row.state_bytes) if row.state_bytes is not None else "",
        )
    return shown


def show(cell: dict[str, Any], console: Console) -> None:
    """The table, then why rows failed, then how to read it."""
    console.print(table(cell))
    rows = summarise(cell)
    for row in rows:
        if row.failure:
            console.print(f"{row.name} failed: {row.failure}", style="red", highlight=False)
    warn_of_others(taken_by_others(cell), console)
    dense = max((row.computed_communication or 0 for row in rows if is_plain_ddp(row.name)), default=0)
    communication = f", computed communication (dense: {dense:.0f} ms at this rate)" if dense else ""
    if not dense and parse_rate(cell["rate"]):
        communication = ", computed communication"
    console.print(
        "* best DDP of this run, by median. × best DDP: its time / ours, median over rounds; above 1 is faster. "
        "exposed: step - compute floor (none). CPU: process time per step and worker. sent: measured on the "
        f"interface. bound: max(compute floor{communication}). s to loss: training time from the first step on until "
        f"the mean training loss of {SMOOTHED_OVER} steps is so low; all reach it. held-out loss: all after the same "
        "number of steps.\n",
        style="dim",
        highlight=False,
    )
