"""Runs one case alone: what a printed script calls."""

from __future__ import annotations

from typing import Any

from workers import WorkerPool

from machine.case import Case, Piece
from machine.search import run


def replay(how: str, program: str, delay: float = 0.02, workers: int = 2, **options: Any) -> None:
    """Prints the verdict on a program."""
    case = Case(how=how, program=(Piece(program),), delay=delay, workers=workers, **options)
    with WorkerPool(workers) as pool:
        (outcome,) = run(pool, [case])
    print(f"{outcome.kind}: {outcome.text}" if outcome.text else outcome.kind)
