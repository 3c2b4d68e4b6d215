"""Every table of one cell of the training benchmark. From raw JSON alone."""

from typing import Any

from rich.console import Console

from ..tables import alarm, note, table, value
from . import levels, summary, tradeoff
from .breakdown import PHASES


def show(cell: dict[str, Any], console: Console) -> None:
    """The step times; then, where they were measured, two levels, compression and the breakdown."""
    summary.show(cell, console)
    levels.show(cell, console)
    tradeoff.show(cell, console)
    show_breakdown(cell, console)


def show_breakdown(cell: dict[str, Any], console: Console) -> None:
    """The tables of a cell that was measured with --breakdown; nothing for another."""
    asked = {one["name"]: one["breakdown"] for one in cell["strategies"] if one.get("breakdown")}
    for name, found in asked.items():
        if "failure" in found:
            alarm(console, f"No breakdown of {name}: {found['failure']}")
    profiled = {name: found for name, found in asked.items() if "failure" not in found}
    if not profiled:
        return
    headings = [phase.replace("_", "\n", 1).replace("_", "-\n") for phase in PHASES]
    phases = table("One step of rank 0 by phase, ms (a profiled run of its own)", "", ["step", *headings])
    for name, found in profiled.items():
        phases.add_row(name, *(value(ms, ".1f") for ms in (found["step_ms"], *map(found["phases"].get, PHASES))))
    console.print(phases)
    parts = list(dict.fromkeys(part["name"] for found in profiled.values() for part in found["modules"]))
    modules = table("By module, ms: forward/backward", "", parts)
    for name, found in profiled.items():
        own = {part["name"]: f"{_short(part['forward_ms'])}/{_short(part['backward_ms'])}" for part in found["modules"]}
        modules.add_row(name, *(own.get(part, "") for part in parts))
    console.print(modules)
    operators = table("By communication operator", "", ["operator", "per step", "in flight ms", "exposed ms"])
    for name, found in profiled.items():
        if found["operators"] is None:
            operators.add_row(name, "not seen by the profiler", "", "", "")
        for one in found["operators"] or ():
            times = (value(one[key], ".1f") for key in ("in_flight_ms", "exposed_ms"))
            operators.add_row(name, one["name"], f"{one['count']:g}", *times)
    console.print(operators)
    note(
        console,
        "exposed: the training thread waits, in the trace of an engine; for torch's strategies, something moves and no "
        "operator runs. Where communication cannot be seen its cells are empty, and waits are in their phase.",
    )


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"
