"""Bars of a step by phase, from the profiled runs of training --breakdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from .. import drawing
from .contest import Cell, median, short_rate
from .figures import panels_below_each_other

# In the order of the bar: what the training thread does, then what it waits for.
COLOURS = {
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


def breakdowns(cell: Cell) -> dict[str, dict[str, Any]]:
    """By strategy: the floor, and the best size of each kind, as far as they were profiled; the shortest step last."""
    names = [row.name for row in sorted([*cell.best_of_each_kind()], key=median, reverse=True)]
    floor = [row.name for row in cell.finished if row.name == "none"]
    found = {name: cell.strategy(name).get("breakdown") for name in [*names, *floor]}
    return {name: one for name, one in found.items() if one and "failure" not in one}


def are_in(cell: Cell) -> bool:
    return bool(breakdowns(cell))


def draw(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """A panel per rate, a bar per strategy, a colour per phase."""
    figure, panels = panels_below_each_other(cells, lambda cell: 0.5 + 0.3 * len(breakdowns(cell)), width=10)
    for axes, cell in zip(panels, cells, strict=True):
        found = breakdowns(cell)
        for place, one in enumerate(found.values()):
            left = 0.0
            for phase, colour in COLOURS.items():
                ms = one["phases"].get(phase) or 0.0
                axes.barh(place, ms, left=left, color=colour, height=0.72)
                left += ms
            axes.plot([one["step_ms"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.6)
            axes.text(max(left, one["step_ms"]), place, f" {one['step_ms']:.0f}", va="center", fontsize=8)
        axes.set_yticks(range(len(found)), list(found), fontsize=8)
        axes.set_title(short_rate(cell.rate), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 1.09 * max(max(one["step_ms"], _sum(one)) for one in found.values()))
        drawing.plain(axes)
    panels[-1].set_xlabel(
        "ms per step of rank 0, profiled; every panel has its own scale\n"
        "mark: the whole step, beside which a compressor may encode, merge and decode"
    )
    seen = {phase for cell in cells for one in breakdowns(cell).values() for phase, ms in one["phases"].items() if ms}
    entries = [Patch(color=colour, label=phase.replace("_", " ")) for phase, colour in COLOURS.items() if phase in seen]
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"A step by phase: {cells[0].setting.label}")
    drawing.save(figure, path, about)


def _sum(one: dict[str, Any]) -> float:
    return sum(ms or 0.0 for ms in one["phases"].values())
