"""How all pictures look, and how they are written."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plain(axes: Axes) -> None:
    """No frame, and faint lines at the marks of the horizontal axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path, origin: Sequence[str] = ()) -> None:
    """Writes the picture as a PNG, its folder made if need be, and closes it.

    origin: lines that say where the numbers come from, small and under everything else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if origin:
        figure.canvas.draw()  # now everything has its place
        figure.set_layout_engine("none")
        for legend in figure.legends:  # else it would move to the bottom of the larger picture, onto the footnote
            legend.set_bbox_to_anchor((0, 0, 1, 1), transform=figure.transFigure)
        broken = [part for line in origin for part in textwrap.wrap(line, int(17 * figure.get_figwidth()))]
        bottom = figure.get_tightbbox().y0 / figure.get_figheight()
        figure.text(0.01, bottom - 0.01, "\n".join(broken), fontsize=6.5, color="#666666", va="top")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
