"""The table of the bandwidth that strategies need. From raw JSON alone."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..network.rates import bits, show_rate
from ..tables import table
from .measure import Needed


def show(workers: int, limit: float, needed: Sequence[Needed], console: Console) -> None:
    """The table for one number of workers, the strategy that needs least first."""
    title = f"Bandwidth needed for a step within {limit:g} × its compute floor · {workers} workers"
    made = table(title, "strategy", ("holds at", "step / floor", "not at", "step / floor"))
    for one in sorted(needed, key=lambda one: bits(one.holds) if one.holds else math.inf):
        ratios = dict(one.measured)

        def ratio(rate: str | None, ratios: dict[str, float | None] = ratios) -> str:
            found = ratios.get(rate) if rate else None
            return ("failed" if rate else "") if found is None else f"{found:.3f}"

        holds = show_rate(one.holds) if one.holds else "none of these"
        fails = show_rate(one.fails) if one.fails else ""
        made.add_row(one.strategy, holds, ratio(one.holds), fails, ratio(one.fails))
    console.print(made)


def show_file(payload: dict[str, Any], console: Console) -> None:
    """The tables of one file of raw results."""
    by_workers: dict[int, list[Needed]] = {}
    for one in payload.get("needed", []):
        by_workers.setdefault(one["workers"], []).append(Needed(**{k: v for k, v in one.items() if k != "workers"}))
    for workers, found in by_workers.items():
        show(workers, payload["settings"]["limit"], found, console)
