"""What compression costs and saves in a step, and the time to a loss. From raw JSON alone, so the report can use it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from .. import losses, stats
from ..command import show_size
from ..network.rates import parse_rate
from ..tables import note, table, value
from . import summary
from .strategies import trains_like

#: What a compressor computes in a step, as it reports it.
WORK = ("encode_ms", "merge_ms", "decode_ms")


@dataclass(frozen=True)
class Compression:
    """One compressed strategy in one cell, per step; None where it is not known."""

    name: str
    payload: int  # bytes that one rank sends
    dense: int | None  # bytes that a dense ring sends
    saved: float | None  # ms of communication less, at the link's rate: computed from the two
    spent: float | None  # ms of encoding, merging and decoding, measured

    @property
    def net(self) -> float | None:
        """ms that are saved less those that are spent."""
        return None if self.saved is None or self.spent is None else self.saved - self.spent

    @property
    def loses(self) -> bool | None:
        """Whether it computes longer than it saves."""
        return None if self.net is None else self.net < 0


def compressions(cell: dict[str, Any]) -> list[Compression]:
    """One row for each strategy with a compressor that was measured."""
    found = []
    bits = parse_rate(cell["rate"])
    for one in cell["strategies"]:
        reports, engines = (
            [report for block in one["blocks"] for report in block.get(key) or () if report]
            for key in ("compressor", "engine")
        )
        if one["failure"] or not reports:
            continue
        payload, dense = one["payload_bytes_per_step"], reports[0].get("dense_bytes")
        saved = (dense - payload) * 8 / bits * 1e3 if bits and dense is not None else None
        found.append(Compression(one["name"], payload, dense, saved, _spent(reports) or _spent(engines)))
    return found


def _spent(reports: Sequence[dict[str, Any]]) -> float | None:
    """Median of what the reports say was computed; None where none says it."""
    known = [sum(report.get(key) or 0.0 for key in WORK) for report in reports if report.get("encode_ms") is not None]
    return statistics.median(known) if known else None


def show(cell: dict[str, Any], console: Console) -> None:
    """The table of compression compute against communication saved; nothing where nothing was compressed."""
    rows = compressions(cell)
    if not rows:
        return
    columns = ("sends", "dense\nsends", "communication\nsaved ms", "compression\ncompute ms", "saved -\ncompute ms")
    made = table("Compression, per step and worker", "strategy", columns)
    for row in rows:
        net = value(row.net, ".1f")
        made.add_row(
            row.name,
            show_size(row.payload),
            value(row.dense, show_size),
            value(row.saved, ".1f"),
            value(row.spent, ".1f"),
            f"[red]{net}, loses[/red]" if row.loses else net,
        )
    console.print(made)
    note(
        console,
        "saved: computed from bytes and rate, as if nothing hid it. compute: encoding, merging and decoding, measured; "
        "some of it runs beside other work.",
    )


@dataclass(frozen=True)
class TimeToLoss:
    """One strategy's way to a training loss: measured steps times measured milliseconds, from two runs."""

    name: str
    trained_as: str  # whose losses were taken
    steps: float | None  # mean over the seeds; None where a seed has not come so far
    seconds: float | None


def times_to_loss(
    cell: dict[str, Any], curves: Sequence[dict[str, Any]], target: float | None = None
) -> tuple[float | None, list[TimeToLoss]]:
    """The target loss and one row for each strategy that was measured and has losses.

    curves: cells of benchmarks.convergence. Losses are averaged over losses.LAST steps. A target of None takes the
    lowest that all of these strategies reach with every seed.
    """
    chosen = [(row, name) for row in summary.summarise(cell) if row.median and (name := trains_like(row.name, curves))]
    own = {name: losses.smoothed(curves, name) for _, name in chosen}
    if target is None and own:
        target = max(min(curve) for found in own.values() for curve in found)
    if target is None:
        return None, []
    rows = []
    for row, name in chosen:
        reached = [stats.first_at(curve, target) for curve in own[name]]
        known = [step for step in reached if step is not None]
        steps = statistics.mean(known) if len(known) == len(reached) else None
        seconds = None if steps is None or row.median is None else steps * row.median / 1e3
        rows.append(TimeToLoss(row.name, name, steps, seconds))
    return target, rows


def show_time_to_loss(
    cell: dict[str, Any], curves: Sequence[dict[str, Any]], target: float | None, console: Console
) -> None:
    """The table of times to a loss; nothing without losses."""
    target, rows = times_to_loss(cell, curves, target)
    if not rows:
        return
    trained, timed = curves[0]["plan"]["optimizer"], cell["plan"]["optimizer"]
    which = "" if trained == timed else f": losses with {trained}, times with {timed}"
    title = f"Time to a training loss of {target:.3f} (computed: steps × ms per step, two measurements{which})"
    made = table(title, ["strategy", "losses of"], ["steps", "seconds"])
    for row in sorted(rows, key=lambda row: row.seconds if row.seconds is not None else float("inf")):
        steps = "not reached" if row.steps is None else f"{row.steps:.0f}"
        made.add_row(row.name, row.trained_as, steps, value(row.seconds, ".1f"))
    console.print(made)
