"""The map of where each method wins: link rate against workload and number of workers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from benchmarks import pictures
from benchmarks.report import contest
from benchmarks.report.contest import FAMILIES, Cell, Setting, TakesPart, Verdict, family, short_rate

# Columns that the map always has, so that what was not measured is seen not to be.
RATES = ("100mbit", "500mbit", "1gbit", "2.5gbit", "10gbit", "unlimited")
LOST = "#c0392b"
MISSING = "#e4e4e4"


def draw(
    cells: dict[tuple[Setting, str], Cell], panels: Sequence[tuple[str, TakesPart]], about: Sequence[str], path: Path
) -> None:
    """One map per (title, who takes part), below each other."""
    settings = sorted({setting for setting, _ in cells})
    rates = contest.by_rate([*RATES, *(rate for _, rate in cells)])
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        figsize=(2.6 + 1.62 * len(rates), 1.6 + len(panels) * (0.75 + 0.95 * len(settings))),
        layout="constrained",
    )
    seen = set()
    for panel, (title, takes_part) in zip(axes[:, 0], panels, strict=True):
        for row, setting in enumerate(settings):
            for column, rate in enumerate(rates):
                cell = cells.get((setting, rate))
                verdict = contest.verdict(cell, takes_part) if cell else None
                if verdict:
                    seen.add(family(verdict.winner))
                _one(panel, column, row, verdict)
        panel.set(xlim=(0, len(rates)), ylim=(len(settings), 0), title=title)
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
    entries.append(Patch(facecolor=MISSING, edgecolor="#9a9a9a", hatch="////", linewidth=0, label="not measured"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    pictures.save(figure, path, about)


def _one(axes: Axes, column: int, row: int, verdict: Verdict | None) -> None:
    """One cell: the winner, and the best rival's time over the best of ours."""
    corner, middle = (column + 0.03, row + 0.04), column + 0.5
    if verdict is None:
        axes.add_patch(Rectangle(corner, 0.94, 0.92, facecolor=MISSING, edgecolor="#9a9a9a", hatch="////", linewidth=0))
        return
    colour = _paled(family(verdict.winner).colour) if verdict.tie else family(verdict.winner).colour
    axes.add_patch(Rectangle(corner, 0.94, 0.92, facecolor=colour, linewidth=0))
    ink = "black" if _is_light(colour) else "white"
    lost = verdict.ratio is not None and verdict.ratio < 1
    if lost:
        inner = (column + 0.045, row + 0.06)
        axes.add_patch(Rectangle(inner, 0.91, 0.88, facecolor="none", edgecolor=LOST, linewidth=2.5))
    axes.text(middle, row + 0.27, verdict.winner, ha="center", va="center", fontsize=8.5, color=ink, fontweight="bold")
    if verdict.ratio is None:
        text = "no rival measured" if verdict.rival is None else "none of ours measured"
        axes.text(middle, row + 0.6, text, ha="center", va="center", fontsize=7.5, color=ink)
        return
    sign = "≈ " if verdict.tie else ""
    axes.text(middle, row + 0.53, f"{sign}{verdict.ratio:.2f}×", ha="center", va="center", fontsize=12, color=ink)
    other = f"best of ours: {verdict.ours}" if lost else f"best rival: {verdict.rival}"
    axes.text(middle, row + 0.79, other.replace(": ", ":\n"), ha="center", va="center", fontsize=7, color=ink)


def _paled(colour: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.35 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _is_light(colour: str | tuple[float, float, float]) -> bool:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.6
