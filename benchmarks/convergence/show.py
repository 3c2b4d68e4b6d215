"""Turns the losses of the convergence benchmark into rows and a table. Pure, so the report can use it too."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..stats import trailing_mean
from ..tables import alarm, note, table, value

DENSE = "ddp"  # what every other strategy is compared with, seed by seed
LAST = 20  # training losses at the end that are averaged: one step's depends on its batch
TOLERANCE = 1.03  # a held-out loss further above the dense one is pointed out


@dataclass(frozen=True)
class LossRow:
    """One strategy over its seeds. Ratios are to dense, paired by seed; None where dense was not trained."""

    name: str
    seeds: int = 0
    held_out: float | None = None  # mean over the seeds, after the last step
    training: float | None = None  # mean of the LAST training losses, and over the seeds
    ratio: float | None = None  # mean over the seeds of held-out loss / dense's
    worst: float | None = None  # the largest of these ratios
    worst_seed: int | None = None
    failures: tuple[str, ...] = ()


def rows(cells: Sequence[dict[str, Any]]) -> list[LossRow]:
    """One row per strategy, in the order of the cells."""
    dense = {cell["plan"]["seed"]: _held_out(cell) for cell in _finished(cells, DENSE)}
    return [_row(name, cells, dense) for name in dict.fromkeys(cell["plan"]["strategy"] for cell in cells)]


def _row(name: str, cells: Sequence[dict[str, Any]], dense: dict[int, float]) -> LossRow:
    own = _finished(cells, name)
    mine = [cell for cell in cells if cell["plan"]["strategy"] == name]
    failures = tuple(f"seed {cell['plan']['seed']}: {cell['failure']}" for cell in mine if cell["failure"])
    if not own:
        return LossRow(name, failures=failures)
    seeds = [cell["plan"]["seed"] for cell in own]
    ratios = {seed: _held_out(cell) / dense[seed] for seed, cell in zip(seeds, own, strict=True) if seed in dense}
    worst = max(ratios, key=lambda seed: ratios[seed], default=None)
    return LossRow(
        name,
        len(own),
        statistics.mean(_held_out(cell) for cell in own),
        statistics.mean(loss for cell in own for loss in cell["losses"][-LAST:]),
        statistics.mean(ratios.values()) if ratios else None,
        None if worst is None else ratios[worst],
        worst,
        failures,
    )


def _finished(cells: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["plan"]["strategy"] == name and not cell["failure"] and cell["held_out"]]


def _held_out(cell: dict[str, Any]) -> float:
    return float(cell["held_out"][-1][1])


def read(path: Path) -> list[dict[str, Any]]:
    """The cells of a file that benchmarks.convergence wrote. Raises ValueError for another file."""
    try:
        payload = json.loads(path.read_text())
        if payload["benchmark"] == "convergence":
            return list(payload["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} holds no losses: pass what --json of benchmarks.convergence wrote")


def smoothed(cells: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """For each finished seed the training loss by step, each the mean of itself and those up to LAST - 1 before it."""
    return [trailing_mean(cell["losses"], LAST) for cell in _finished(cells, name)]


def show_pair(cell: dict[str, Any], console: Console) -> None:
    """How one pair of strategy and seed has ended."""
    end = cell["failure"] or (f"held-out loss {cell['held_out'][-1][1]:.4f}" if cell["held_out"] else "done")
    console.print(f"{cell['plan']['strategy']}, seed {cell['plan']['seed']}: {end}", highlight=False)


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, then why pairs failed; nothing of a workload that has no held-out examples."""
    if not cells:
        return
    plan, found = cells[0]["plan"], rows(cells)
    title = (
        f"{plan.get('workload', 'gpt')}: loss after {plan['steps']} steps · {cells[0]['workers']} workers · "
        f"batch {plan['batch']} each · {plan['optimizer']}, learning rate {plan['learning_rate']:g}"
    )
    columns = ("seeds", "held-out\nloss", f"training loss,\nlast {LAST}", "held-out\n/ dense", "worst\nseed")
    made = table(title, "strategy", columns)
    for row in found:
        made.add_row(
            row.name,
            str(row.seeds),
            value(row.held_out, ".4f") or "[red]failed[/red]",
            value(row.training, ".4f"),
            value(row.ratio, _marked),
            value(row.worst, lambda ratio, row=row: f"{_marked(ratio)} ({row.worst_seed})"),  # type: ignore[misc]
        )
    console.print(made)
    for row in found:
        for failure in row.failures:
            alarm(console, f"{row.name} failed, {failure}")
    note(
        console,
        f"held-out / dense: by seed, then averaged; dense is {DENSE}. Red: more than "
        f"{100 * (TOLERANCE - 1):.0f}% above it.",
    )


def _marked(ratio: float) -> str:
    return f"[red]{ratio:.3f}[/red]" if ratio > TOLERANCE else f"{ratio:.3f}"
