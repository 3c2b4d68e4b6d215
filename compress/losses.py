"""What compressors have cost in loss: one table, which ``python -m benchmarks.convergence.table`` makes of stored runs.

A method counts by the worst of its trainings: held-out loss against dense, each at its own best learning rate, means
over the seeds that both have, three at least. A preset counts as it was trained, with a start of 150 steps, which is
shorter than its own.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("losses.json")


@cache
def table() -> dict[str, float]:
    """How far above dense, as a fraction and never below 0, by the method's name as the benchmarks spell it."""
    found = json.loads(TABLE.read_text())["methods"]
    return {name: max(0.0, float(one["above"])) for name, one in found.items()}


def within(bound: float) -> list[str]:
    """The methods that lose at most so much, those that lose least first; none at 0, which is exact."""
    if bound <= 0:
        return []
    return sorted((name for name, above in table().items() if above <= bound), key=table().__getitem__)


def above(name: str | None) -> float:
    """What a method has cost; nothing without one, and more than any where nothing is stored."""
    return 0.0 if name is None else table().get(name, float("inf"))
