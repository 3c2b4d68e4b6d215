"""Points as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..report import markdown
from .points import Point, by, cells_of, summary

QUIET = 0.1  # a machine is, where no round's compute floor takes longer than another's by more than that share


def table(found: Sequence[Point]) -> str:
    """A row for all, and for each part of them."""
    everything = {"all": found}
    everything |= {f"{workers} workers": each for workers, each in by(found, "workers").items()}
    everything |= by(found, "workload")
    quiet = [point for point in found if point.rounds.swing <= QUIET]
    if quiet:
        everything["quiet machine"] = quiet
        for workers, each in by(quiet, "workers").items():
            everything[f"quiet machine, {workers} workers"] = each
    head = ["predicted against measured", "points", "median error", "90th percentile"]
    head += ["first place right or within 3%", "or not told apart from it", "measured again"]
    return markdown.table(head, (_row(name, each) for name, each in everything.items()))


def _row(name: str, own: Sequence[Point]) -> list[str]:
    each = summary(own)
    first = f"{each.first:.0%} of {each.cells} cells"
    again = "" if each.repeats is None else f"{each.repeats:.0%}"
    return [name, str(each.points), f"{each.median:.1%}", f"{each.p90:.1%}", first, f"{each.level:.0%}", again]


def cells(found: Sequence[Point]) -> str:
    """A row for each cell: how far it is off as a whole, and how unsteady its machine was."""
    rows = []
    for (file, _), own in cells_of(found).items():
        one, middle = own[0], statistics.median(point.error for point in own)
        named = [file, str(one.workers), one.rate, one.workload, str(len(own))]
        rows.append([*named, f"{middle:+.1%}", f"{one.rounds.swing:.0%}"])
    return markdown.table(
        ["file", "workers", "rate", "model", "points", "median of errors", "swing of the floor"], rows
    )
