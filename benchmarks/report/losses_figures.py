"""Pictures of the convergence benchmark: held-out loss by step, and over the time that the steps would take."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from .. import drawing
from ..records import Source
from . import contest
from .contest import Cell, kind, median, short_rate
from .figures import styles_of

Curve = list[tuple[int, float]]  # (steps done, mean held-out loss over the seeds)


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

    def curve_of(name: str) -> Curve | None:
        return found.get(contest.trains_like(name, source.cells) or "")

    cells = [cell for cell in cells if any(curve_of(row.name) for row in cell.best_of_each_kind())]
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    figure, panels = plt.subplots(
        rows, columns, squeeze=False, figsize=(6.2 * columns, 1.8 + 3.4 * rows), layout="constrained"
    )
    styles = styles_of([row.name for cell in cells for row in cell.best_of_each_kind() if curve_of(row.name)])
    for axes, cell in zip(panels.flat, cells, strict=False):
        for row in cell.best_of_each_kind():
            curve = curve_of(row.name)
            if curve:
                seconds = [steps * median(row) / 1e3 for steps, _ in curve]
                axes.plot(seconds, [loss for _, loss in curve], **styles[kind(row.name)])
        axes.set_title(short_rate(cell.rate), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(left=0)
        drawing.plain(axes)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    figure.supylabel("held-out loss (nats)", fontsize=10)
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    optimizer = source.cells[0]["plan"]["optimizer"]
    figure.suptitle(
        f"COMPUTED: held-out loss by step ({optimizer}, on loopback) × median step time in seconds\n"
        f"{cells[0].setting.label}"
    )
    drawing.save(figure, path, about)
