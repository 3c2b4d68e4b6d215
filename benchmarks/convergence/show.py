"""The table of losses."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..losses import DENSE, LAST, TOLERANCE, rows
from ..tables import alarm, note, table, value


def show_pair(cell: dict[str, Any], console: Console) -> None:
    """How one pair of strategy and seed has ended."""
    end = cell["failure"] or (f"held-out loss {cell['held_out'][-1][1]:.4f}" if cell["held_out"] else "done")
    console.print(f"{cell['plan']['strategy']}, seed {cell['plan']['seed']}: {end}", highlight=False)


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, then why pairs failed; nothing of a workload that has no held-out examples."""
    if not cells:
        return
    experiment, found = cells[0]["plan"], rows(cells)
    title = (
        f"{experiment.get('workload', 'gpt')}: loss after {experiment['steps']} steps · {cells[0]['workers']} workers "
        f"· batch {experiment['batch']} each · {experiment['optimizer']}, learning rate {experiment['learning_rate']:g}"
    )
    columns = ("seeds", "held-out\nloss", f"training loss,\nlast {LAST}", "held-out\n/ dense", "worst\nseed")
    made = table(title, "strategy", columns)
    for row in found:
        made.add_row(
            row.name,
            str(row.seeds),
            value(row.held_out, ".4f") or "[red]failed[/red]",
            value(row.training, ".4f"),
            value(row.ratio, _marked),
            value(row.worst, lambda ratio, row=row: f"{_marked(ratio)} ({row.worst_seed})"),  # type: ignore[misc]
        )
    console.print(made)
    for row in found:
        for failure in row.failures:
            alarm(console, f"{row.name} failed, {failure}")
    note(
        console,
        f"held-out / dense: by seed, then averaged; dense is {DENSE}. Red: more than "
        f"{100 * (TOLERANCE - 1):.0f}% above it.",
    )


def _marked(ratio: float) -> str:
    return f"[red]{ratio:.3f}[/red]" if ratio > TOLERANCE else f"{ratio:.3f}"
