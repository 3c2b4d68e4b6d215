"""The map of where each method wins: link rate against workload and number of workers."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from .. import drawing
from . import comparison
from .comparison import FAMILIES, Cell, Compared, Setting, TakesPart, family, short_rate
from .evidence import Evidence, origin

# Columns that the map always has, so that what was not measured is seen not to be.
RATES = ("100mbit", "500mbit", "1gbit", "2.5gbit", "10gbit", "unlimited")
LOST = "#c0392b"
UNMEASURED: dict[str, Any] = {"facecolor": "#e4e4e4", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0}
LONGEST_NAME = 16  # characters that fit into a cell; longer ones are smaller
UNPROVEN = "†"


@dataclass(frozen=True)
class Map:
    """One map: which strategies take part in it, and which of these have a loss that was not measured."""

    title: str
    takes_part: TakesPart
    is_unproven: TakesPart


def draw(cells: dict[tuple[Setting, str], Cell], maps: Sequence[Map], about: Sequence[str], path: Path) -> None:
    """The maps, below each other."""
    settings = sorted({setting for setting, _ in cells})
    rates = comparison.by_rate([*RATES, *(rate for _, rate in cells)])
    figure, axes = plt.subplots(
        len(maps),
        squeeze=False,
        figsize=(2.6 + 1.62 * len(rates), 1.6 + len(maps) * (0.75 + 0.95 * len(settings))),
        layout="constrained",
    )
    seen, unproven = set(), False
    for panel, one in zip(axes[:, 0], maps, strict=True):
        for row, setting in enumerate(settings):
            for column, rate in enumerate(rates):
                cell = cells.get((setting, rate))
                compared = comparison.compare(cell, one.takes_part) if cell else None
                shown = [name for name in (compared.ours, compared.rival) if name] if compared else []
                doubts = {name for name in shown if cell and one.is_unproven(cell, name)}
                if compared:
                    seen.add(family(compared.winner))
                unproven |= bool(doubts)
                _one(panel, column, row, compared, doubts)
        panel.set(xlim=(0, len(rates)), ylim=(len(settings), 0), title=one.title)
        panel.set_xticks([column + 0.5 for column in range(len(rates))], [short_rate(rate) for rate in rates])
        panel.set_yticks(
            [row + 0.5 for row in range(len(settings))],
            [setting.label.replace(", ", "\n", 1).replace(", on ", "\n") for setting in settings],
        )
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    entries = [Patch(color=one.colour, label=one.label) for one in FAMILIES if one in seen]
    entries.append(Patch(facecolor="white", edgecolor=LOST, linewidth=2, label="this library loses"))
    entries.append(Patch(facecolor=_paled("#555555"), label="≈ and pale: rounds disagree on who is faster"))
    entries.append(Patch(**UNMEASURED, label="not measured"))
    if unproven:
        entries.append(Patch(facecolor="none", label=f"{UNPROVEN} its loss was not measured"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawing.save(figure, path, about)


def draw_map(evidence: Evidence, path: Path) -> None:
    """Who wins where: among what trains exactly as DDP does, then among all whose loss is not known to suffer."""
    title = "The same training as DDP: float32, nothing rounded away"
    maps = [Map(title, lambda _, name: comparison.is_exact(name), lambda *_: False)]
    if evidence.inexact():
        maps.append(
            Map(
                "Any method, 16-bit and compressed ones too",
                lambda cell, name: not evidence.is_barred(name, cell.setting),
                lambda cell, name: evidence.loss(name, cell.setting) is None,
            )
        )
    draw(evidence.chosen, maps, origin(list(evidence.chosen.values())), path)


def _one(axes: Axes, column: int, row: int, compared: Compared | None, doubts: Set[str] = frozenset()) -> None:
    """One cell: the winner, the best rival's time over the best of ours, and the best of the other side.

    doubts: those of the two whose loss was not measured.
    """
    corner, middle = (column + 0.03, row + 0.04), column + 0.5
    if compared is None:
        axes.add_patch(Rectangle(corner, 0.94, 0.92, **UNMEASURED))
        return

    def called(name: str | None) -> str:
        return f"{name} {UNPROVEN}" if name in doubts else f"{name}"

    colour = _paled(family(compared.winner).colour) if compared.tie else family(compared.winner).colour
    axes.add_patch(Rectangle(corner, 0.94, 0.92, facecolor=colour, linewidth=0))
    ink = "black" if _is_light(colour) else "white"
    lost = compared.ratio is not None and compared.winner != compared.ours
    if lost:
        inner = (column + 0.045, row + 0.06)
        axes.add_patch(Rectangle(inner, 0.91, 0.88, facecolor="none", edgecolor=LOST, linewidth=2.5))
    name = called(compared.winner)
    size = 8.5 * min(1, LONGEST_NAME / len(name))
    axes.text(middle, row + 0.27, name, ha="center", va="center", fontsize=size, color=ink, fontweight="bold")
    if compared.ratio is None:
        text = "no rival measured" if compared.rival is None else "none of ours measured"
        axes.text(middle, row + 0.6, text, ha="center", va="center", fontsize=7.5, color=ink)
        return
    sign = "≈ " if compared.tie else ""
    axes.text(middle, row + 0.53, f"{sign}{compared.ratio:.2f}×", ha="center", va="center", fontsize=12, color=ink)
    other = f"best of ours:\n{called(compared.ours)}" if lost else f"best rival:\n{called(compared.rival)}"
    axes.text(middle, row + 0.79, other, ha="center", va="center", fontsize=7, color=ink)


def _paled(colour: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.35 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _is_light(colour: str | tuple[float, float, float]) -> bool:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.6
