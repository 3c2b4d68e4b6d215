"""The table of what attaching costs a single rank. From raw JSON alone."""

import statistics
from typing import Any

from rich.console import Console

from ..stats import taken_meanwhile
from ..tables import note, table, warn_of_others


def beyond_ddp(cell: dict[str, Any]) -> dict[str, float]:
    """By strategy, what a step takes beyond plain DDP's: the median over rounds of the difference, in ms."""
    times = {one["name"]: one["ms"] for one in cell["strategies"]}
    return {
        name: statistics.median(own - ddp for own, ddp in zip(ms, times["ddp"], strict=True))
        for name, ms in times.items()
    }


def show(cell: dict[str, Any], console: Console) -> None:
    """One row for each strategy."""
    beyond = beyond_ddp(cell)
    ddp = next(statistics.median(one["ms"]) for one in cell["strategies"] if one["name"] == "ddp")
    made = table("A step of a single rank", "strategy", ["ms", "ms beyond DDP", "% of its step", "calls"])
    for one in cell["strategies"]:
        more = beyond[one["name"]]
        numbers = f"{statistics.median(one['ms']):.2f}", f"{more:+.3f}", f"{100 * more / ddp:+.2f}", str(one["calls"])
        made.add_row(one["name"], *numbers)
    console.print(made)
    note(
        console,
        f"Medians over {cell['plan']['rounds']} rounds, in which the strategies take turns; differences are taken "
        "within a round. Calls: functions that a step calls, in Python or from it.",
    )
    warn_of_others(console, taken_meanwhile([cell]))
