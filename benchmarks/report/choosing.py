"""What ``compressor="auto"`` chose, against the best of a sweep by hand, for the results pages."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..stats import round_times
from ..training.summary import Row
from . import comparison
from .comparison import Cell, median
from .markdown import number, table
from .steps import in_order, run_name, where

AUTO, PLANNED = "auto", "planned"


def has_chosen(cells: Iterable[Cell]) -> bool:
    return any(_row(cell) is not None for cell in cells)


def chosen_table(cells: Iterable[Cell]) -> str:
    """A row for each run in which it took part."""
    rows = []
    for cell in in_order(cells):
        auto, swept = _row(cell), _swept(cell)
        if auto is None or not swept:
            continue
        best = min(swept, key=median)
        plain = min((row for row in swept if comparison.kind(row.name) == "ddp"), key=median, default=None)
        rows.append([
            where(cell), run_name(cell), number(cell.floor), _named(plain), _named(best), number(auto.median),
            _against(cell, auto, best), _against(cell, auto, plain), _choice(cell),
        ])  # fmt: skip
    head = ["link", "run", "compute floor", "tuned DDP", "best of the sweep", "auto", "auto against the best"]
    return table([*head, "auto against tuned DDP", "what it chose"], rows)


def has_settled(cells: Iterable[Cell]) -> bool:
    return any(_settled(cell) for cell in cells)


def settled_table(cells: Iterable[Cell]) -> str:
    """A row for each choice that ran beside the same setting by hand: what it adds to a step, by pairs of rounds."""
    rows = []
    for cell in in_order(cells):
        for settled, fixed in _settled(cell):
            pairs = [np.array(round_times(cell.strategy(row.name))) for row in (settled, fixed)]
            low, middle, high = 100 * (np.percentile(pairs[0] / pairs[1], (25, 50, 75)) - 1)
            times = [number(settled.median), number(fixed.median), str(len(pairs[0]))]
            rows.append([where(cell), run_name(cell), settled.name, *times, f"{middle:+.2f}% ({low:+.1f}–{high:+.1f})"])
    return table(["link", "run", "choice", "settled auto", "the same by hand", "rounds", "auto adds"], rows)


def _settled(cell: Cell) -> list[tuple[Row, Row]]:
    rows = {row.name: row for row in cell.finished}
    found = []
    for name, row in rows.items():
        kind, _, setting = name.partition(":")
        by_hand = setting if setting.startswith("ddp:") else f"dear:{setting}"
        if kind == PLANNED and by_hand in rows:
            found.append((row, rows[by_hand]))
    return found


def _row(cell: Cell) -> Row | None:
    return next((row for row in cell.finished if row.name == AUTO), None)


def _swept(cell: Cell) -> list[Row]:
    """The exact strategies beside it."""
    skipped = (AUTO, PLANNED, comparison.FLOOR)
    return [row for row in cell.finished if row.name.partition(":")[0] not in skipped and comparison.is_exact(row.name)]


def _named(row: Row | None) -> str:
    return "" if row is None else f"{number(row.median)} ({row.name})"


def _against(cell: Cell, ours: Row, rival: Row | None) -> str:
    if rival is None:
        return ""
    times: Sequence[np.ndarray] = [np.array(round_times(cell.strategy(row.name))) for row in (rival, ours)]
    low, middle, high = np.percentile(times[0] / times[1], (25, 50, 75))
    return f"{middle:.3f}× ({low:.2f}–{high:.2f})"


def _choice(cell: Cell) -> str:
    plan = cell.strategy(AUTO).get("chosen")
    if not plan:
        return "nothing"
    way = "plain DDP" if plan["update"] == "ddp" else plan["compressor"] or plan["update"]
    return f"{way}, {plan['bucket_cap_mb']:.3g} MiB"
