"""The picture of losses: held-out loss by step, a line for each method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from .. import drawing
from . import comparison
from .comparison import family, kind
from .sweeps import Sweep

MARKERS = "osD^vPX<>*hd"
DASHES = ("-", "--", "-.", ":")
SHADES = (0.0, -0.45, 0.45)  # towards black, towards white


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
        axes.set(
            title=sweep.title,
            xlabel="steps",
            ylabel="held-out loss (nats)",
        )
        axes.legend(frameon=False)
        drawing.plain(axes)
    for empty in panels.flat[len(sweeps) :]:
        empty.remove()
    figure.suptitle("Held-out loss at each method's own best learning rate, mean over the seeds")
    drawing.save(figure, path, about)


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
