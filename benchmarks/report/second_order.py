"""Tables of preconditioned training beside SGD, Adam and Muon, for the results pages."""

from typing import Any

from ..command import show_size
from ..network.rates import show_rate
from ..second_order.clock import PARTS
from ..second_order.show import rows
from .markdown import number, table


def title(cell: dict[str, Any]) -> str:
    """What was trained, and where."""
    plan = cell["plan"]
    return f"{plan['workload']}, {cell['workers']} workers, {show_rate(cell['rate'])}, batch {plan['batch']} each"


def steps_table(cell: dict[str, Any]) -> str:
    """A row for each method: its step, and what of it preconditioning adds on rank 0."""
    parts = {one["name"]: one["breakdown"] or {} for one in cell["strategies"]}
    found = [
        [
            f"`{row.name}`",
            number(row.median),
            f"{1 / row.speedup:.2f}×" if row.speedup else "",
            show_size(row.sent) if row.sent else "",
            show_size(row.state_bytes) if row.state_bytes else "",
            *(f"{parts[row.name][part]:.2f}" if part in parts[row.name] else "" for part in PARTS),
        ]
        for row in rows(cell)
        if not row.failure
    ]
    return table(["method", "ms/step", "over SGD on DDP", "sent", "optimizer state", *PARTS], found)
