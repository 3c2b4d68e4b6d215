"""Ranks of low-rank compressors: a number, a fraction of the smaller side, "4x" fewer elements, or "auto"."""

from __future__ import annotations

import re
from typing import Any

#: The largest rank that the kernels take.
LARGEST = 256

Rank = int | float | str


def check_rank(rank: Any, option: str = "rank") -> Rank:
    """The rank, if it is one.

    Raises:
        ValueError: one sentence says what it must be.
    """
    if type(rank) is int and 1 <= rank <= LARGEST:
        return rank
    if type(rank) is float and 0 < rank < 1:
        return rank
    if rank == "auto" or (isinstance(rank, str) and re.fullmatch(r"\d+(\.\d+)?x", rank) and float(rank[:-1]) > 1):
        return str(rank)
    raise ValueError(
        f"{option} must be a whole number from 1 to {LARGEST}, a fraction of the smaller side between 0 and 1, "
        f'how many times fewer elements are sent, such as "4x", or "auto", not {rank!r}.'
    )


def rank_for(rank: Rank, rows: int, columns: int, auto: float, each: float) -> int:
    """What the rank is for a matrix [rows, columns]; ``auto`` is the fraction that "auto" stands for, and ``each`` what
    a rank of 1 sends, in elements."""
    smaller = min(rows, columns)
    wanted = auto if rank == "auto" else rank
    if isinstance(wanted, str):
        wanted = int(rows * columns / (float(wanted[:-1]) * each))
    elif isinstance(wanted, float):
        wanted = round(wanted * smaller)
    return min(max(1, wanted), smaller, LARGEST)
