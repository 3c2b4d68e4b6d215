"""Pictures of losses: held-out loss by step, training loss over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from .. import drawing
from ..records import Source
from ..stats import SMOOTHED_OVER, trailing_mean
from . import comparison
from .comparison import Cell, kind, short_rate
from .figures import styles_of
from .sweeps import Sweep


def by_step(source: Source, about: Sequence[str], path: Path) -> None:
    """Mean over the seeds that finished, a line per strategy."""
    looks = [
        (cell["plan"]["strategy"], *look) for cell in source.cells if not cell["failure"] for look in cell["held_out"]
    ]
    means = pd.DataFrame(looks, columns=["strategy", "step", "loss"]).groupby(["strategy", "step"]).loss.mean()
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, style in styles_of(list(means.index.unique("strategy"))).items():
        axes.plot(means[name], label=name, **style)
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


def at_best_rates(sweeps: Sequence[Sweep], about: Sequence[str], path: Path) -> None:
    """Held-out loss by step of each method at its own best learning rate, mean over the seeds; a panel per sweep."""
    columns = max(1, min(2, len(sweeps)))
    rows = max(1, -(-len(sweeps) // columns))
    figure, panels = plt.subplots(rows, columns, squeeze=False, figsize=(12, 1 + 3.6 * rows), layout="constrained")
    shown = [[one for one in sweep.rows if len(one.held_out) > 1] for sweep in sweeps]
    styles = styles_of(list(dict.fromkeys(one.strategy for found in shown for one in found)))
    for axes, sweep, found in zip(panels.flat, sweeps, shown, strict=False):
        for one in found:
            steps, losses = zip(*one.curve[1:], strict=True)  # the first look is far above all others
            axes.plot(steps, losses, label=f"{one.strategy}, {one.learning_rate:g}", **styles[one.strategy])
        axes.set(title=f"{sweep.workload}, {sweep.optimizer}", xlabel="steps", ylabel="held-out loss (nats)")
        axes.legend(frameon=False)
        drawing.plain(axes)
    figure.suptitle("Held-out loss at each method's own best learning rate, mean over the seeds")
    drawing.save(figure, path, about)


def are_in(cell: Cell) -> bool:
    return any(cell.strategy(row.name).get("losses") for row in cell.finished if row.name != comparison.FLOOR)


def over_time(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """Training loss over each strategy's own training time, smoothed; a panel per rate, a line for each kind."""
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    size = (6.2 * columns, 1.7 + 3.4 * rows)
    figure, panels = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    styles = styles_of([row.name for cell in cells for row in cell.best_of_each_kind()])
    for axes, cell in zip(panels.flat, cells, strict=False):
        for row in cell.best_of_each_kind():
            strategy = cell.strategy(row.name)
            seconds, losses = np.cumsum(strategy["clock_ms"]) / 1e3, trailing_mean(strategy["losses"])
            axes.plot(seconds, losses, markevery=[-1], **styles[kind(row.name)])
        axes.set_title(short_rate(cell.rate), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(left=0)
        drawing.plain(axes)
    for axes in panels.flat[len(cells) :]:
        axes.set_visible(False)
    figure.supylabel("training loss (nats)", fontsize=10)
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    title = f"Loss over training time, each on its own clock in seconds: {cells[0].setting.label}"
    figure.suptitle(f"{title}\nmean of {SMOOTHED_OVER} steps; a marker where a strategy finished")
    drawing.save(figure, path, about)
