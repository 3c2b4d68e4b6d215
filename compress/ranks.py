"""Ranks of low-rank compressors: a number, a fraction of the smaller side, or "auto"."""

from __future__ import annotations

from typing import Any, Literal

#: The largest rank that the kernels take.
LARGEST = 256

Rank = int | float | Literal["auto"]


def check_rank(rank: Any, option: str = "rank") -> Rank:
    """The rank, if it is one.

    Raises:
        ValueError: one sentence says what it must be.
    """
    if type(rank) is int and 1 <= rank <= LARGEST:
        return rank
    if type(rank) is float and 0 < rank < 1:
        return rank
    if rank == "auto":
        return "auto"
    raise ValueError(
        f"{option} must be a whole number from 1 to {LARGEST}, a fraction of the smaller side between 0 and 1, or "
        f'"auto", not {rank!r}.'
    )


def rank_for(rank: Rank, rows: int, columns: int, auto: float) -> int:
    """What the rank is for a matrix [rows, columns]; ``auto`` is the fraction that "auto" stands for."""
    smaller = min(rows, columns)
    fraction = auto if rank == "auto" else rank
    wanted = max(1, round(fraction * smaller)) if isinstance(fraction, float) else fraction
    return min(wanted, smaller, LARGEST)
