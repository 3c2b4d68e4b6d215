"""Turns the raw JSON of the training benchmark into rows and a table. Pure, so the report can use it too."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import tables
from ..command import show_size
from ..network.rates import parse_rate, show_rate
from ..stats import (
    FLOOR,
    SMOOTHED_OVER,
    best_ddp,
    finished,
    first_at,
    is_plain_ddp,
    paired_ratio,
    round_times,
    slowest_rank,
    taken_by_others,
    trailing_mean,
)
from ..tables import note, value


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
    sent: float | None = None  # bytes that left one worker's interface, or its node's, measured
    computed_communication: float | None = None  # payload bytes / rate; of nodes, sent / rate
    of_bound: float | None = None  # max(floor, computed communication) / ours, in percent
    loss: float | None = None  # held-out, after all steps
    seconds_to_loss: float | None = None  # of its own training time, until its smoothed loss is at the target
    state_bytes: int | None = None  # of the rank with most
    is_best_ddp: bool = False


def summarise(cell: dict[str, Any], target: float | None = None, base: dict[str, Any] | None = None) -> list[Row]:
    """One row per strategy of a cell, failed ones included.

    target: a loss; None takes the cell's own. base: what speed-ups are over; None takes the best plain DDP.
    """
    strategies = cell["strategies"]
    best = best_ddp(strategies) if base is None else base
    floor = next((one for one in strategies if one["name"] == FLOOR and finished(one)), None)
    target = target_loss(cell) if target is None else target
    bits, of_nodes = parse_rate(cell["rate"]), "node_size" in cell
    return [_row(one, best, floor, bits, target, of_nodes) for one in strategies]


def target_loss(cell: dict[str, Any]) -> float | None:
    """The lowest smoothed training loss that all strategies of a cell reach; None where losses were not kept.

    The compute floor is left out: its ranks train apart.
    """
    curves = [one.get("losses") for one in cell["strategies"] if finished(one) and one["name"] != FLOOR]
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
    of_nodes: bool,
) -> Row:
    if not finished(strategy):
        return Row(strategy["name"], failure=strategy["failure"] or "no round was finished")
    rounds = round_times(strategy)
    median = statistics.median(rounds)
    steps = [ms for block in strategy["blocks"] for ms in slowest_rank(block["ms"])]
    sent = [each for block in strategy["blocks"] for each in block["sent_bytes_per_step"] if each]
    carried = statistics.median(sent or [0]) if of_nodes else strategy["payload_bytes_per_step"]
    communication = carried * 8 / bits * 1e3 if bits else None
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
        seconds_to_loss=None if target is None or strategy["name"] == FLOOR else _seconds_to(target, strategy),
        state_bytes=max(strategy["optimizer_state_bytes"], default=None),
        is_best_ddp=strategy is best,
    )


def table(cell: dict[str, Any]) -> Table:
    """The table a person reads, for one cell."""
    experiment, target = cell["plan"], target_loss(cell)
    network = f"{cell['network']} of {cell['node_size']}" if "node_size" in cell else cell["network"]
    title = f"{show_rate(cell['rate'])} · {cell['workers']} workers · {network} · {experiment['optimizer']} · "
    variant = f" · {cell['variant']}" if "variant" in cell else ""
    title += f"{experiment['rounds']} rounds of {experiment['steps']} steps{variant}"
    columns = ["ms/step\nmedian", "p10-p90", "× best\nDDP", "exposed\nms", "CPU ms", "sent", "% of\nbound"]
    columns += [] if target is None else [f"s to loss\n{target:.2f}"]
    shown = tables.table(title, "strategy", [*columns, "held-out\nloss", "optimizer\nstate"])
    for row in summarise(cell):
        if row.failure:
            shown.add_row(row.name, "[red]failed[/red]")
            continue
        shown.add_row(
            f"{row.name} *" if row.is_best_ddp else row.name,
            value(row.median, ".1f"),
            f"{row.p10:.0f}-{row.p90:.0f}",
            value(row.speedup, ".3f"),
            value(row.exposed, ".1f"),
            value(row.cpu, ".0f"),
            value(row.sent, show_size),
            value(row.of_bound, ".0f"),
            *([] if target is None else [value(row.seconds_to_loss, ".1f")]),
            value(row.loss, ".4f"),
            value(row.state_bytes, show_size),
        )
    return shown


def show(cell: dict[str, Any], console: Console) -> None:
    """The table, then why rows failed, then how to read it."""
    console.print(table(cell))
    rows = summarise(cell)
    tables.failures(console, rows)
    tables.warn_of_others(console, taken_by_others(cell))
    dense = max((row.computed_communication or 0 for row in rows if is_plain_ddp(row.name)), default=0)
    carried, port = "computed communication", "interface"
    if "node_size" in cell:
        carried, port = "bytes sent", "port, of all workers of a node"
    communication = f", {carried}" if parse_rate(cell["rate"]) else ""
    communication += f" (dense: {dense:.0f} ms at this rate)" if dense else ""
    note(
        console,
        "* best DDP of this run, by median. × best DDP: its time / ours, median over rounds; above 1 is faster. "
        "exposed: step - compute floor (none). CPU: process time per step and worker. sent: measured on the "
        f"{port}. bound: max(compute floor{communication}). s to loss: training time from the first step on until "
        f"the mean training loss of {SMOOTHED_OVER} steps is so low; all reach it. held-out loss: all after the same "
        "number of steps, to which auto adds those in which it chose.",
    )
