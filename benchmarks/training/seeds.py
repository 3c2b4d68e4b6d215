"""Cells of the training benchmark that differ in their seed alone, together: what is the method's, and what the seed's.

Pure: from raw JSON alone, so the report can use it too.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import tables
from ..losses import TOLERANCE
from ..network.rates import show_rate
from ..stats import FLOOR, SMOOTHED_OVER
from ..tables import note, value
from . import summary


@dataclass(frozen=True)
class Spread:
    """One number over the seeds."""

    values: tuple[float, ...]

    def __format__(self, form: str) -> str:
        """The mean, and from where to where: "3.1 (2.9-3.4)"."""
        low, high = min(self.values), max(self.values)
        return f"{statistics.mean(self.values):{form}} ({low:{form}}-{high:{form}})"


@dataclass(frozen=True)
class SeedsRow:
    """One strategy over the seeds. None where a seed has no such number, as after a failure."""

    name: str
    step: Spread | None  # ms, each seed's median
    speedup: Spread | None  # best plain DDP's time / ours
    seconds_to_loss: Spread | None  # of its own training time, to the loss that all reach with every seed
    held_out: Spread | None
    held_out_ratio: Spread | None  # to the best plain DDP's of the same seed


def groups(cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The cells of each setting that was measured with several seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        experiment = {name: value for name, value in cell["plan"].items() if name not in ("seed", "excluded")}
        key = repr((cell["workers"], cell["rate"], cell["network"], sorted(experiment.items(), key=repr)))
        found.setdefault(key, []).append(cell)
    return [group for group in found.values() if len({cell["plan"].get("seed") for cell in group}) > 1]


def target_loss(cells: Sequence[dict[str, Any]]) -> float | None:
    """The lowest smoothed training loss that every strategy reaches with every seed; None without losses."""
    targets = [summary.target_loss(cell) for cell in cells]
    return max((target for target in targets if target is not None), default=None)


def rows(cells: Sequence[dict[str, Any]]) -> list[SeedsRow]:
    """One row for each strategy of these cells, which differ in the seed alone."""
    target = target_loss(cells)
    by_seed = [{row.name: row for row in summary.summarise(cell, target)} for cell in cells]
    return [_row(name, by_seed) for name in by_seed[0]]


def _row(name: str, by_seed: Sequence[dict[str, summary.Row]]) -> SeedsRow:
    own = [found[name] for found in by_seed]
    dense = [next((row for row in found.values() if row.is_best_ddp), None) for found in by_seed]
    ratios = [
        row.loss / best.loss if best and best.loss and row.loss is not None else None
        for row, best in zip(own, dense, strict=True)
    ]
    return SeedsRow(
        name,
        _spread([row.median for row in own]),
        _spread([row.speedup for row in own]),
        _spread([row.seconds_to_loss for row in own]),
        _spread([row.loss for row in own]),
        None if name == FLOOR else _spread(ratios),
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known and len(known) == len(values) else None


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """What a person reads of one setting: each number's mean over the seeds, and its smallest and largest."""
    first, target = cells[0], target_loss(cells)
    seeds = ", ".join(str(cell["plan"]["seed"]) for cell in cells)
    workload = first["plan"].get("workload", "gpt")
    title = f"{workload}, {show_rate(first['rate'])} · {first['workers']} workers · over the seeds {seeds}"
    to_loss = [] if target is None else [f"s to loss {target:.2f}"]
    shown = tables.table(
        title, "strategy", ["ms/step", "× best DDP", *to_loss, "held-out loss", "held-out\n/ best DDP's"]
    )
    for row in rows(cells):
        if row.step is None:
            shown.add_row(row.name, "[red]failed with a seed[/red]")
            continue
        ratio = value(row.held_out_ratio, ".3f")
        if row.held_out_ratio and statistics.mean(row.held_out_ratio.values) > TOLERANCE:
            ratio = f"[red]{ratio}[/red]"
        loss = [] if target is None else [value(row.seconds_to_loss, ".2f")]
        numbers = [value(row.step, ".1f"), value(row.speedup, ".2f"), *loss, value(row.held_out, ".4f")]
        shown.add_row(row.name, *numbers, ratio)
    return shown


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for each setting that was measured with several seeds; nothing where none was."""
    found = groups(cells)
    for group in found:
        console.print(table(group))
    if found:
        note(
            console,
            "Mean over the seeds (smallest-largest); a seed sets the weights and the order of the examples. s to loss: "
            f"training time until the mean training loss of {SMOOTHED_OVER} steps is so low, which every strategy "
            f"reaches with every seed. Red: a held-out loss more than {100 * (TOLERANCE - 1):.0f}% above DDP's.",
        )
