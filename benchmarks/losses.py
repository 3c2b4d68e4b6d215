"""The losses of the convergence benchmark as numbers. From raw JSON alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
