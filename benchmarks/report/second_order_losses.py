"""Tables of the losses of preconditioned training: over seeds, and of the search for learning rates."""

from collections.abc import Sequence
from typing import Any

from ..second_order.show import goal_of, kind_of, rows
from ..second_order.tuned import best
from ..stats import first_at, trailing_mean
from ..training.seeds import Spread, groups
from .markdown import number, table


def seeded(cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The cells that differ in their seed alone."""
    return groups(cells)


#: How many times faster than SGD a second-order method is meant to be.
AIM = 1.5

Run = tuple[float | None, float | None, int | None, float | None]  # seconds to the loss, times faster, steps, held-out


def losses_table(cells: Sequence[dict[str, Any]]) -> str:
    """A row for each method of cells that differ in their seed alone: how soon it is at SGD's lowest loss, and what of
    held-out examples after as many steps. Each seed's goal is its own."""
    head = ["method @ rate", "steps to SGD's loss", "s to it", "times faster than SGD on DDP", "held-out loss"]
    forms = {2: ".0f", 0: ".2f", 1: ".2f", 3: ".4f"}
    shown = []
    for name, seeds in _by_method(cells).items():
        columns = list(zip(*seeds, strict=True))
        shown.append([f"`{name}`", *(_spread(columns[index], form, len(cells)) for index, form in forms.items())])
    return table(head, shown)


def reached(cells: Sequence[dict[str, Any]]) -> str:
    """A sentence: which second-order methods are AIM times faster, in the mean over seeds that all get there."""
    fast = []
    for name, seeds in _by_method(cells).items():
        ratios = [ratio for _, ratio, _, _ in seeds if ratio is not None]
        if not name.startswith("sgd/") and len(ratios) == len(cells) and sum(ratios) / len(ratios) >= AIM:
            fast.append(f"`{name}`")
    return f"{AIM:g} times faster, with every seed there, is what is aimed at: {', '.join(fast) or 'none'} is so."


def _by_method(cells: Sequence[dict[str, Any]]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for cell in cells:
        goal, own = goal_of(cell), {row.name: row for row in rows(cell)}
        plain = next((row.seconds_to_loss for row in own.values() if kind_of(row.name) == "sgd/ddp"), None)
        for one in cell["strategies"]:
            row = own.get(one["name"])
            if row is None or row.failure or goal is None:
                continue
            seconds = row.seconds_to_loss
            ratio = plain / seconds if plain and seconds else None
            steps = first_at(trailing_mean(one["losses"]), goal)
            found.setdefault(one["name"], []).append((seconds, ratio, steps, row.loss))
    return found


def _spread(values: Sequence[float | None], form: str, seeds: int) -> str:
    """The mean, and from where to where; how many seeds got there, if not all."""
    known = tuple(value for value in values if value is not None)
    if not known:
        return "never"
    missing = f", {len(known)} of {seeds} seeds" if len(known) < seeds else ""
    return f"{Spread(known):{form}}{missing}"


def search_table(cell: dict[str, Any]) -> str:
    """A row for each method of a search: its best rate, and its lowest loss at each, the lowest rate first."""
    found = []
    for method, one in best(cell).items():
        chosen = one.chosen
        found.append(
            [
                f"`{method}`",
                f"{chosen.learning_rate:g}{' (an end of the grid)' if one.at_an_end else ''}",
                "never" if chosen.steps is None else str(chosen.steps),
                number(chosen.held_out),
                " · ".join(f"{tried.lowest:.3g}" for tried in one.others),
            ]
        )
    head = ["method", "best rate", "steps to SGD's loss", "held-out loss", "lowest loss at each rate"]
    return table(head, found)
