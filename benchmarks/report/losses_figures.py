"""Pictures of losses: held-out loss by step, over the time that the steps would take; training loss over time."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from .. import drawing
from ..records import Source
from ..stats import SMOOTHED_OVER, trailing_mean
from ..training.summary import Row
from . import contest
from .contest import Cell, kind, median, short_rate
from .figures import styles_of

Curve = list[tuple[int, float]]  # (steps done, mean held-out loss over the seeds)
Line = tuple[Any, Any]  # seconds, losses


def curves(source: Source) -> dict[str, Curve]:
    """By strategy, those of which at least one seed finished."""
    found: dict[str, list[list[list[float]]]] = {}
    for cell in source.cells:
        if not cell["failure"] and cell["held_out"]:
            found.setdefault(cell["plan"]["strategy"], []).append(cell["held_out"])
    return {
        name: [(int(looks[0][0]), statistics.mean(loss for _, loss in looks)) for looks in zip(*seeds, strict=False)]
        for name, seeds in found.items()
    }


def by_step(source: Source, about: Sequence[str], path: Path) -> None:
    """Mean over the seeds, a line per strategy."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    found = curves(source)
    styles = styles_of(list(found))
    for name, style in styles.items():
        axes.plot(*zip(*found[name], strict=True), label=name, **style)
    plan = source.cells[0]["plan"]
    workload = plan.get("workload", "gpt")
    axes.set(
        xlabel="steps",
        ylabel="held-out loss (nats), mean over the seeds",
        title=f"Held-out loss by step: {workload}, {source.cells[0]['workers']} workers, {plan['optimizer']}",
    )
    axes.legend(frameon=False)
    drawing.plain(axes)
    drawing.save(figure, path, about)


def matches(source: Source, cells: Sequence[Cell]) -> bool:
    """Whether losses and a setting's step times are of the same work (workload, batch, workers) and strategies."""
    known = curves(source)
    names = [row.name for cell in cells for row in cell.best_of_each_kind()]
    if not any(contest.trains_like(name, source.cells) in known for name in names):
        return False
    course, setting = source.cells[0], cells[0].setting
    plan = course["plan"]
    same = (plan.get("workload", "gpt"), plan["batch"], course["workers"])
    return same == (setting.workload, setting.batch, setting.workers)


def by_computed_time(source: Source, cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """Losses by step, each step as long as its median at the rate: computed from two measurements, and labelled so."""
    found = curves(source)

    def curve_of(cell: Cell, row: Row) -> Line | None:
        curve = found.get(contest.trains_like(row.name, source.cells) or "")
        if not curve:
            return None
        return [steps * median(row) / 1e3 for steps, _ in curve], [loss for _, loss in curve]

    optimizer = source.cells[0]["plan"]["optimizer"]
    title = f"COMPUTED: held-out loss by step ({optimizer}, on loopback) × median step time in seconds"
    _panels(cells, curve_of, "held-out loss (nats)", f"{title}\n{cells[0].setting.label}", about, path)


def over_time(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """Training loss over each strategy's own training time, smoothed; a panel per rate."""

    def curve_of(cell: Cell, row: Row) -> Line | None:
        strategy = cell.strategy(row.name)
        return np.cumsum(strategy["clock_ms"]) / 1e3, trailing_mean(strategy["losses"])

    title = f"Loss over training time, each on its own clock in seconds: {cells[0].setting.label}"
    explained = f"mean of {SMOOTHED_OVER} steps; a marker where a strategy finished"
    _panels(cells, curve_of, "training loss (nats)", f"{title}\n{explained}", about, path, markers_at_end=True)


def are_in(cell: Cell) -> bool:
    return any(cell.strategy(row.name).get("losses") for row in cell.finished if row.name != contest.FLOOR)


def _panels(
    cells: Sequence[Cell],
    curve_of: Callable[[Cell, Row], Line | None],
    label: str,
    title: str,
    about: Sequence[str],
    path: Path,
    markers_at_end: bool = False,
) -> None:
    """A panel for each rate, with a line for each kind that has one."""
    lines = [{row.name: curve_of(cell, row) for row in cell.best_of_each_kind()} for cell in cells]
    shown = [(cell, found) for cell, found in zip(cells, lines, strict=True) if any(found.values())]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    size = (6.2 * columns, 1.7 + 3.4 * rows)
    figure, panels = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    styles = styles_of([name for _, found in shown for name, line in found.items() if line])
    for axes, (cell, found) in zip(panels.flat, shown, strict=False):
        for name, line in found.items():
            if line:
                axes.plot(*line, markevery=[-1] if markers_at_end else None, **styles[kind(name)])
        axes.set_title(short_rate(cell.rate), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(left=0)
        drawing.plain(axes)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supylabel(label, fontsize=10)
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title)
    drawing.save(figure, path, about)
