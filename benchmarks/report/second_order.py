"""Tables of preconditioned training beside SGD, Adam and Muon, for the results pages."""

import statistics
from collections.abc import Sequence
from typing import Any

from ..command import show_size
from ..network.rates import show_rate
from ..second_order.clock import PARTS
from ..second_order.memory import COLUMNS, more_than_sgd
from ..second_order.show import kind_of, rows, slowest
from ..training.summary import Row
from . import second_order_losses as losses
from .markdown import number, table

__all__ = ["against_kfac", "exposed", "failed", "losses", "memory_table", "steps_table", "title", "update_table"]


def title(cell: dict[str, Any]) -> str:
    """What was trained, and where."""
    plan = cell["plan"]
    return f"{plan['workload']}, {cell['workers']} workers, {show_rate(cell['rate'])}, batch {plan['batch']} each"


def steps_table(cell: dict[str, Any]) -> str:
    """A row for each method: its step, and what of it is second-order work."""
    taken = _by_kind(cell)
    found = [
        [
            f"`{kind_of(row.name)}`",
            number(row.median),
            f"{1 / row.speedup:.2f}×" if row.speedup else "",
            show_size(row.sent) if row.sent else "",
            show_size(row.state_bytes) if row.state_bytes else "",
            *(_ms(taken.get(kind_of(row.name)), part) for part in PARTS),
        ]
        for row in rows(cell)
        if not row.failure
    ]
    return table(["method", "ms/step", "over SGD on DDP", "sent", "optimizer state", *PARTS], found)


def failed(cell: dict[str, Any]) -> list[str]:
    """Methods that did not run, and why."""
    return [f"`{kind_of(row.name)}`: {row.failure}" for row in rows(cell) if row.failure]


def against_kfac(cell: dict[str, Any]) -> str:
    """How many times as much K-FAC takes as DP-KFAC, by what runs them; empty where neither was measured."""
    taken, sent = _by_kind(cell), {kind_of(row.name): row.sent for row in _finished(cell)}
    found = []
    for kfac, own in (("kfac/ddp", "dpkfac/ddp"), ("kfac/dear", "dpkfac/dear"), ("kfac-rival/ddp", "dpkfac/ddp")):
        if kfac in sent and own in sent:
            numbers = [_ratio(slowest(taken[kfac], part), slowest(taken[own], part)) for part in _COMPARED]
            numbers.append(_ratio(sent[kfac], sent[own]))
            found.append([f"`{kfac}` / `{own}`", *numbers])
    return table(["", *_COMPARED, "bytes sent"], found) if found else ""


_COMPARED = ("factors", "inversion", "preconditioning", "communication")


def update_table(cell: dict[str, Any]) -> str:
    """Muon's update and state, of the rank with most, over those on DDP; empty where it was not measured."""
    taken, found = _by_kind(cell), {kind_of(row.name): row for row in _finished(cell)}
    ddp, own = found.get("muon/ddp"), found.get("muon/dear")
    if ddp is None or own is None:
        return ""
    update = _ratio(slowest(taken["muon/dear"], "update"), slowest(taken["muon/ddp"], "update"), ".3f")
    state = _ratio(own.state_bytes, ddp.state_bytes, ".3f")
    head = ["", "update, CPU time", "optimizer state", "1.15 / workers"]
    return table(head, [["`muon/dear` / `muon/ddp`", update, state, f"{1.15 / cell['workers']:.3f}"]])


def exposed(cell: dict[str, Any]) -> str:
    """Communication that nothing hides, of the rank with most; empty where nobody looked."""
    found = []
    for kind, one in _by_kind(cell).items():
        gradients, own = slowest(one, "exposed"), slowest(one, "communication")
        if gradients is not None:
            found.append([f"`{kind}`", number(gradients), number(own or 0.0), number(gradients + (own or 0.0))])
    return table(["method", "gradients, ms", "preconditioner, ms", "together"], found) if found else ""


def memory_table(cells: Sequence[dict[str, Any]]) -> str:
    """Of one workload and number of workers: a row for each method."""
    found = []
    for cell in cells:
        if cell["failure"]:
            continue
        numbers = []
        for column in COLUMNS:
            beyond = more_than_sgd(cell, cells, column)
            numbers += [show_size(statistics.mean(cell[column])), show_size(max(cell[column]))]
            numbers.append("" if beyond is None else f"{100 * beyond:.1f}%")
        found.append([f"`{cell['plan']['method']}`", *numbers])
    head = [each for name in COLUMNS.values() for each in (f"{name}, mean", "most", "beyond SGD")]
    return table(["method", *head], found)


def _by_kind(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods at the learning rates that are shown, by their names without these."""
    shown = {row.name for row in _finished(cell)}
    return {kind_of(one["name"]): one for one in cell["strategies"] if one["name"] in shown}


def _finished(cell: dict[str, Any]) -> list[Row]:
    return [row for row in rows(cell) if not row.failure]


def _ms(one: dict[str, Any] | None, part: str) -> str:
    found = slowest(one, part) if one else None
    return "" if found is None else f"{found:.2f}"


def _ratio(theirs: float | None, own: float | None, form: str = ".2f") -> str:
    return f"{theirs / own:{form}}{'×' if form == '.2f' else ''}" if theirs and own else ""
