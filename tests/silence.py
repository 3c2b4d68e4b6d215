"""What the tests named test_silence_*.py share: a short program, run with plain DDP and with the library, compared.

The promise: the same training, bit for bit with two workers, or one clear error. A program is as those of
tests/machine (see running.py there for the names it may use); pieces are separated by empty lines.
"""

from __future__ import annotations

import functools
import pathlib
import textwrap
from collections.abc import Callable, Collection
from typing import Any

import pytest
from machine.case import Case, Piece
from machine.search import run
from workers import WorkerPool

BOTH = ("sharded", "replicated")
EVERY = ("sharded", "replicated", "compressed", "register")
IN_SHARDS = ("sharded", "owned")  # where gradients and optimizer state are in parts, and may be refused to be read
#: The tests in which the promise is broken today, by their ids. One that is fixed fails until its line is removed,
#: except where "races" stands behind it: what is broken sometimes goes well.
KNOWN = {line.split()[0]: line.split()[1:] for line in
         pathlib.Path(__file__).with_name("silence_known.txt").read_text().splitlines()}  # fmt: skip
WARM = "attach()\n\nfor step in range(3): train(step)"


def pieces(program: str) -> tuple[Piece, ...]:
    """A program cut at its empty lines."""
    return tuple(Piece(part) for part in textwrap.dedent(program).strip().split("\n\n"))


def silence(
    name: str, program: str, hows: tuple[str, ...] = BOTH, may_refuse: bool | Collection[str] = False, **options: Any
) -> list[Any]:
    """One test for each of ``hows``.

    may_refuse: an error is an answer too, always or in these settings ("owned" among them: test_owned_silence.py);
        otherwise the training must be the same.
    options: of the Case.
    """
    return [known(f"{name}-{how}", Case(how, program=pieces(program), **options), may_refuse) for how in hows]


def known(name: str, *arguments: Any) -> Any:
    """A test's parameters, marked if it is among those that fail today."""
    name = name.replace(" ", "_")
    marks = []
    if name in KNOWN:
        marks.append(pytest.mark.xfail(strict=not KNOWN[name], reason="trains something else today"))
    return pytest.param(*arguments, id=name, marks=marks)


def told(function: Callable[..., None]) -> Callable[..., str | None]:
    """A worker's function that returns what went wrong: an exception would end the pool's processes."""

    @functools.wraps(function)
    def run_and_tell(*arguments: Any) -> str | None:
        try:
            function(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    return run_and_tell


def check_told(pool: WorkerPool, function: Callable[..., str | None], *arguments: Any) -> None:
    """Runs a function that tells, and fails with what it told."""
    told = pool.run(function, *arguments)
    assert not any(told), next(text for text in told if text)


def check(pool: WorkerPool, case: Case, may_refuse: bool | Collection[str]) -> None:
    """Fails unless the library trains the same, or says in one sentence why not where it may."""
    (outcome,) = run(pool, [case])
    assert outcome.kind != "invalid", f"plain DDP cannot run this: {outcome.text}"
    refusable = may_refuse if isinstance(may_refuse, bool) else case.how in may_refuse
    allowed = ("equal", "refused") if refusable else ("equal",)
    assert outcome.kind in allowed, f"{outcome.kind} at {outcome.at!r}: {outcome.text}"
