"""Runs a case in a worker: its program under plain DDP, then under the library, and compares what they noted."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from machine.case import Case, Result
from machine.compare import Rounding, compare, digest
from machine.preconditioned import KINDS
from machine.running import Run

PATIENCE = timedelta(seconds=60)  # for a peer to end the same case
COLLECT_EVERY = 50  # cases
REMEMBERED = 4  # programs of the last cases, as plain DDP ran them
_played = 0
_remembered: dict[str, Plain] = {}


@dataclasses.dataclass(frozen=True)
class Plain:
    """What a program does under plain DDP."""

    notes: list[tuple[int, Any]]
    valid: int  # how many of its pieces plain DDP can run; 0: the program is none
    why: str = ""  # it can run no more
    rounding: Rounding | None = None  # where a sum may be taken in another order
    values: Sequence[str] = ()  # digests of this rank's parameters


def under_plain_ddp(case: Case, rank: int) -> Plain:
    """The program under plain DDP, which is the same however the library is put under it: cases that differ in nothing
    else follow one another. All ranks remember alike, since they have played the same cases."""
    own = case.how if case.how in ("owned", *KINDS) else ""
    key = repr(dataclasses.replace(case, how=own, attach={}, delay=0.0))
    if key not in _remembered:
        while len(_remembered) >= REMEMBERED:
            del _remembered[next(iter(_remembered))]
        try:
            _remembered[key] = _play_plain(case, rank)
        finally:
            torch.set_default_dtype(torch.float32)  # for the run that it is compared with
    return _remembered[key]


def _play_plain(case: Case, rank: int) -> Plain:
    run = Run(case, rank, plain=True)
    valid, why = len(case.program), ""
    error = run.play(valid)
    if error is not None:
        valid, why = run.piece, _text(error)  # plain DDP fails there: what comes before must be equal all the same
        run = Run(case, rank, plain=True)
        if valid == 0 or run.play(valid) is not None:
            return Plain([], 0, why)
    rounding = None
    if run.may_round:
        twin = Run(case, rank, plain=True, double=True)
        twin.play(valid)
        coarse = next((number for number, piece in enumerate(case.program) if "autocast" in piece.code), None)
        rounding = Rounding(run.notes, twin.notes, coarse)
    return Plain(run.notes, valid, why, rounding, run.values)


def play(rank: int, case: Case, number: int = 0) -> Result:
    """One case on this rank."""
    want = under_plain_ddp(case, rank)
    if want.valid == 0:
        return Result("invalid", 0, want.why)
    have = Run(case, rank, plain=False, number=number)
    try:
        raised = have.play(want.valid)
        rounding = None if have.exact else want.rounding
        different = compare(have.notes, want.notes, None if raised else want.valid, rounding)
        if raised is not None and have.engine is not None:
            with contextlib.suppress(Exception):  # tell the peer at once
                have.engine.__exit__(type(raised), raised, raised.__traceback__)
    finally:
        torch.set_default_dtype(torch.float32)
    if different:
        return Result("difference", *different)
    if raised is None:
        # Where bits cannot be compared with plain DDP's, those of the ranks can be with one another.
        pairs = () if rounding is None else tuple(
            (piece, digest(theirs), digest(mine))
            for (piece, mine), (_, theirs) in zip(have.notes, want.notes, strict=True)
        )  # fmt: skip
        return Result("equal", want.valid, notes=pairs)
    where = "".join(traceback.format_exception(raised)[-8:])
    return Result("error", have.piece, _text(raised), where, tuple(want.values[have.piece : have.piece + 2]))


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def play_all(rank: int, world: int, cases: list[Case]) -> list[Result]:
    """Cases one after another, up to and with the first that is not equal: then the group is to be left."""
    store = c10d._get_default_store()
    results = []
    for index, case in enumerate(cases):
        result = play(rank, case, index)
        results.append(result)
        store.set(f"case/{index}/{rank}", "equal" if result.kind == "equal" else "other")
        others = [f"case/{index}/{peer}" for peer in range(world)]
        store.wait(others, PATIENCE)
        if any(store.get(key) != b"equal" for key in others):
            break
    global _played
    _played += len(results)
    if _played >= COLLECT_EVERY:
        _played = 0
        gc.collect()  # dropped models and engines hang in circles
    return results
