"""Bars of what a step consists of: the compute floor and what communication adds, or, once profiled, its phases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .. import drawing
from . import comparison
from .comparison import Cell, family, median, short_rate

FLOOR_COLOUR = "#d5d8dc"
# In the order of the bar: what the training thread does, then what it waits for.
PHASES = {
    "forward": "#8fbcdb",
    "backward": "#f3b37c",
    "optimizer": "#9bcf9b",
    "scheduler": "#c9b3d9",
    "encode": "#6a9c5b",
    "merge": "#a8c686",
    "decode": "#3f7034",
    "exposed_reduce_scatter": "#d9622b",
    "exposed_all_gather": "#2b5fba",
    "exposed_other": "#b03a5b",
}


@dataclass(frozen=True)
class Bar:
    """One strategy: its parts in ms with their colours, a mark across the bar, and the ms written behind it."""

    label: str
    parts: list[tuple[float, str]]
    mark: float
    step: float

    @property
    def end(self) -> float:
        return max(self.step, sum(ms for ms, _ in self.parts))


def step_parts(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """The compute floor, and what communication adds to it, for the best size of each kind."""

    def bars(cell: Cell) -> list[Bar]:
        floor = cell.floor or 0.0
        return [
            Bar(
                row.name,
                [(min(floor, median(row)), FLOOR_COLOUR), (max(median(row) - floor, 0), family(row.name).colour)],
                max(floor, row.computed_communication or 0.0),
                median(row),
            )
            for row in sorted(cell.best_of_each_kind(), key=median, reverse=True)
        ]

    cells = [cell for cell in cells if cell.floor is not None and cell.best_of_each_kind()]
    seen = {family(row.name) for cell in cells for row in cell.best_of_each_kind()}
    entries: list[Any] = [Patch(color=FLOOR_COLOUR, label="compute floor (measured without communication)")]
    for one in comparison.FAMILIES:
        if one in seen:
            entries.append(Patch(color=one.colour, label=f"exposed communication, {one.label}"))
    mark = Line2D([], [], color="black", marker="|", linestyle="", markersize=10, markeredgewidth=1.6)
    mark.set_label("max(compute floor, own communication, computed)")
    label = "ms per step (median); every panel has its own scale"
    legend = {"handles": [*entries, mark], "ncols": 2}
    _draw(cells, bars, 0.27, label, legend, f"What a step consists of: {cells[0].setting.label}", about, path)


def profiled(cell: Cell) -> dict[str, dict[str, Any]]:
    """By strategy: the floor, and the best size of each kind, as far as they were profiled; the shortest step last."""
    names = [row.name for row in sorted(cell.best_of_each_kind(), key=median, reverse=True)]
    floor = [row.name for row in cell.finished if row.name == comparison.FLOOR]
    found = {name: cell.strategy(name).get("breakdown") for name in [*names, *floor]}
    return {name: one for name, one in found.items() if one and "failure" not in one}


def by_phase(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """A step by phase, from the profiled runs of training --breakdown."""

    def bars(cell: Cell) -> list[Bar]:
        return [
            Bar(
                name,
                [(one["phases"].get(phase) or 0.0, colour) for phase, colour in PHASES.items()],
                one["step_ms"],
                one["step_ms"],
            )
            for name, one in profiled(cell).items()
        ]

    seen = {phase for cell in cells for one in profiled(cell).values() for phase, ms in one["phases"].items() if ms}
    entries = [Patch(color=colour, label=phase.replace("_", " ")) for phase, colour in PHASES.items() if phase in seen]
    label = (
        "ms per step of rank 0, profiled; every panel has its own scale\n"
        "mark: the whole step, beside which a compressor may encode, merge and decode"
    )
    legend = {"handles": entries, "ncols": 5}
    _draw(cells, bars, 0.3, label, legend, f"A step by phase: {cells[0].setting.label}", about, path)


def _draw(
    cells: Sequence[Cell],
    bars: Callable[[Cell], list[Bar]],
    height: float,
    label: str,
    legend: dict[str, Any],
    title: str,
    about: Sequence[str],
    path: Path,
) -> None:
    """A panel per rate, a bar per strategy. height: of a bar, in inches."""
    shown = [bars(cell) for cell in cells]
    heights = [0.5 + height * len(one) for one in shown]
    figure, panels = plt.subplots(
        len(cells), squeeze=False, figsize=(10, 1.9 + sum(heights)), height_ratios=heights, layout="constrained"
    )
    for axes, cell, found in zip(panels[:, 0], cells, shown, strict=True):
        for place, bar in enumerate(found):
            left = 0.0
            for ms, colour in bar.parts:
                axes.barh(place, ms, left=left, color=colour, height=0.72)
                left += ms
            axes.plot([bar.mark] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.6)
            axes.text(bar.end, place, f" {bar.step:.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(found)), [bar.label for bar in found], fontsize=8)
        axes.set_title(short_rate(cell.rate), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 1.09 * max(bar.end for bar in found))
        drawing.plain(axes)
    panels[-1, 0].set_xlabel(label)
    figure.legend(**legend, loc="outside lower center", frameon=False, fontsize=8)
    figure.suptitle(title)
    drawing.save(figure, path, about)
