"""What the tests named test_silence_*.py share: a short program, run with plain DDP and with the library, compared.

The promise: the same training, bit for bit with two workers, or one clear error. A program is as those of
tests/machine (see play.py there for the names it may use); pieces are separated by empty lines.
"""

from __future__ import annotations

import pathlib
import textwrap
from typing import Any

import pytest
from machine.case import Case, Piece
from machine.search import run
from workers import WorkerPool

BOTH = ("sharded", "replicated")
EVERY = ("sharded", "replicated", "compressed", "register")
#: The tests in which the promise is broken today, by their ids. One that is fixed fails until its line is removed.
KNOWN = frozenset(pathlib.Path(__file__).with_name("silence_known.txt").read_text().split())
WARM = "attach()\n\nfor step in range(3): train(step)"


def pieces(program: str) -> tuple[Piece, ...]:
    """A program cut at its empty lines."""
    return tuple(Piece(part) for part in textwrap.dedent(program).strip().split("\n\n"))


def silence(
    name: str, program: str, hows: tuple[str, ...] = BOTH, may_refuse: bool = False, **options: Any
) -> list[Any]:
    """One test for each of ``hows``.

    may_refuse: an error is an answer too; otherwise the training must be the same.
    options: of the Case.
    """
    return [known(f"{name}-{how}", Case(how, program=pieces(program), **options), may_refuse) for how in hows]


def known(name: str, *arguments: Any) -> Any:
    """A test's parameters, marked if it is among those that fail today."""
    name = name.replace(" ", "_")
    marks = [pytest.mark.xfail(strict=True, reason="trains something else today")] if name in KNOWN else []
    return pytest.param(*arguments, id=name, marks=marks)


def check(pool: WorkerPool, case: Case, may_refuse: bool) -> None:
    """Fails unless the library trains the same, or says in one sentence why not where it may."""
    (outcome,) = run(pool, [case])
    assert outcome.kind != "invalid", f"plain DDP cannot run this: {outcome.text}"
    allowed = ("equal", "refused") if may_refuse else ("equal",)
    assert outcome.kind in allowed, f"{outcome.kind} at {outcome.at!r}: {outcome.text}"
