"""The picture of step time by link rate, and the look of a strategy's line in every picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from .. import drawing
from ..network.rates import parse_rate
from ..stats import is_plain_ddp
from . import comparison
from .comparison import Cell, family, kind, median, short_rate

MARKERS = "osD^vPX<>*hd"
DASHES = ("-", "--", "-.", ":")
SHADES = (0.0, -0.45, 0.45)  # towards black, towards white
NO_LIMIT_GAP = 3.0  # the place of "no limit" on the rate axis: this many times the highest rate


def step_by_rate(cells: Sequence[Cell], about: Sequence[str], path: Path) -> None:
    """A line for each kind at its best size, and the bound that no dense exchange can beat."""
    figure, axes = plt.subplots(figsize=(9, 6.4), layout="constrained")
    cells = sorted(cells, key=lambda cell: parse_rate(cell.rate) or float("inf"))
    places = _places([cell.rate for cell in cells])
    limited = [cell for cell in cells if parse_rate(cell.rate) is not None]
    styles = styles_of([row.name for cell in cells for row in cell.best_of_each_kind()])
    for name, style in styles.items():
        points = [
            (places[cell.rate], median(row), cell in limited)
            for cell in cells
            for row in cell.best_of_each_kind()
            if kind(row.name) == name
        ]
        joined = [point for point in points if point[2]]
        axes.plot(*zip(*[(x, y) for x, y, _ in joined], strict=True), **style) if joined else None
        for x, y, _ in (point for point in points if not point[2]):
            axes.plot([x], [y], **style)
    _bound(axes, limited, cells, places)
    if len(limited) < len(cells) and limited:
        axes.axvline(max(places[cell.rate] for cell in limited) * NO_LIMIT_GAP**0.5, color="#bbbbbb", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="link rate, each way", ylabel="ms per step (median)")
    axes.set_xticks(list(places.values()), [short_rate(rate) for rate in places])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_title(f"Step time by link rate, each at its best size: {cells[0].setting.label}", fontsize=11)
    drawing.plain(axes)
    axes.grid(axis="y", which="both", alpha=0.2)
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    bound = "bound for float32: max(compute measured, communication computed)"
    handles.append(Line2D([], [], color="black", linestyle=":", label=bound))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawing.save(figure, path, about)


def _places(rates: Sequence[str]) -> dict[str, float]:
    """Where each rate stands on a logarithmic axis; no limit stands apart, behind the fastest."""
    bits = {rate: parse_rate(rate) for rate in comparison.by_rate(rates)}
    fastest = max((one for one in bits.values() if one), default=1e9)
    return {rate: one or fastest * NO_LIMIT_GAP for rate, one in bits.items()}


def styles_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A look for each kind: its family's colour, and within the family other shades, dashes and markers."""
    styles: dict[str, dict[str, Any]] = {}
    of_family: dict[str, int] = {}
    for name in dict.fromkeys(kind(name) for name in sorted(names, key=_order)):
        one = family(name)
        number = of_family.setdefault(one.label, 0)
        of_family[one.label] += 1
        styles[name] = {
            "color": _shade(one.colour, SHADES[number % len(SHADES)]),
            "linestyle": DASHES[number % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.8,
        }
    return styles


def _shade(colour: str, share: float) -> tuple[float, float, float]:
    """The colour mixed with so much white, or black where it is negative."""
    towards = float(share > 0)
    red, green, blue = ((1 - abs(share)) * part + abs(share) * towards for part in to_rgb(colour))
    return red, green, blue


def _order(name: str) -> tuple[int, str]:
    return comparison.FAMILIES.index(family(name)), name


def _bound(axes: Axes, limited: Sequence[Cell], cells: Sequence[Cell], places: dict[str, float]) -> None:
    """max(compute floor, computed communication of uncompressed gradients): measured floor, payload bytes / rate."""
    look: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.6, "zorder": 1}
    points = [(places[cell.rate], bound) for cell in limited if (bound := dense_bound(cell)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **look)
    for cell in cells:
        if cell not in limited and cell.floor is not None:
            x = places[cell.rate]
            axes.plot([x / 1.25, x * 1.25], [cell.floor] * 2, **look)


def dense_bound(cell: Cell) -> float | None:
    """ms that no strategy can beat which sends float32 gradients; None where the floor was not measured."""
    dense = [row.computed_communication or 0.0 for row in cell.finished if is_plain_ddp(row.name)]
    return None if cell.floor is None else max(cell.floor, *dense, 0.0)
