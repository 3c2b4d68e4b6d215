"""Runs many cases, and finds out what those that fail have in common."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from workers import WorkerDied, WorkerPool, WorkerTimeout

from machine.case import Case, Outcome, Result
from machine.play import play_all

BATCH = 25
#: What must not stand in an error's text: it comes from inside torch or Python, and tells a user nothing.
LEAKS = (
    "INTERNAL ASSERT", "zip()", "Boolean value of Tensor", "must be Float", "__func__", "AttributeError",
    "inference tensor", "During a grad (vjp", "NameError", "KeyError: <", "AssertionError", "index out of range",
)  # fmt: skip
OWN_WORDS = re.compile(r"fusion group|engine\.|dear\.|compress\.")  # raised in native code, under backward()
DISAGREE = re.compile(r"Ranks \d+ and \d+ disagree on the values of ")
PARTED = "is not the same on all ranks, as it is under plain DDP"
PEER = re.compile(r"Rank \d .*(connection|did not|left the engine|stalled|ended|closed)|Connection|timed out|Timed out")


def verdict(case: Case, results: list[Result]) -> Outcome:
    """What all ranks' results mean."""
    for result in results:
        if result.kind == "difference":
            return Outcome("difference", result.text, _code(case, result.piece))
    if all(result.kind == "invalid" for result in results):
        return Outcome("invalid", results[0].text)
    errors = [result for result in results if result.kind == "error"]
    if not errors:
        apart = parted([result.notes for result in results])
        return Outcome("equal") if apart is None else Outcome("difference", PARTED, _code(case, apart))
    own = [error for error in errors if not PEER.search(error.text)] or errors
    _, piece, text, where, *_ = own[0]
    at = _code(case, piece)
    if not (clear(text) and (raised_here(where) or OWN_WORDS.search(text))):
        return Outcome("unclear error", text + "\n" + where, at)
    if len(errors) < len(results):
        return Outcome("one-sided error", text, at)
    if "no_sync" in text and not any("no_sync" in each.code for each in case.program):
        return Outcome("misleading error", text, at)
    if DISAGREE.search(text) and len({error.values for error in errors}) == 1:
        return Outcome("false error", text, at)
    return Outcome("refused", text, at)


def parted(everyone: Sequence[Sequence[tuple[int, str, str]]]) -> int | None:
    """The piece at which a value has other bits on one rank than on another, though all ranks have the same under plain
    DDP."""
    for of_ranks in zip(*everyone, strict=False):
        if len({plain for _, plain, _ in of_ranks}) == 1 < len({own for _, _, own in of_ranks}):
            return of_ranks[0][0]
    return None


def clear(text: str) -> bool:
    """One sentence of this library's form, not an error from inside."""
    return "\n" not in text and text.endswith(".") and not any(leak in text for leak in LEAKS) and not PEER.search(text)


def raised_here(where: str) -> bool:
    """Whether the error came through this library's own code."""
    packages = ("dear", "compress", "precondition")
    return any(f"/{package}/" in line for line in where.splitlines() for package in packages)


def _code(case: Case, piece: int) -> str:
    return case.program[piece].code if piece < len(case.program) else "the end"


def run(pool: WorkerPool, cases: list[Case]) -> Iterator[Outcome]:
    """The outcomes of cases, in their order."""
    at = 0
    while at < len(cases):
        batch = cases[at : at + BATCH]
        try:
            everyone = pool.run(play_all, batch, timeout=90.0, group_timeout=8.0)
        except (WorkerDied, WorkerTimeout) as error:
            if len(batch) > 1:
                for case in batch:
                    yield from run(pool, [case])
            else:
                yield Outcome("hang" if isinstance(error, WorkerTimeout) else "crash", str(error)[:2000])
            at += len(batch)
            continue
        except Exception as error:  # a rank that did not come to the end of its case
            if len(batch) > 1:
                for case in batch:
                    yield from run(pool, [case])
            else:
                yield Outcome("hang", f"{type(error).__name__}: {error}"[:2000])
            at += len(batch)
            continue
        for case, results in zip(batch, zip(*everyone, strict=False), strict=False):
            yield verdict(case, list(results))
            at += 1


@dataclasses.dataclass
class Cause:
    """Failures that have one minimal program in common."""

    case: Case
    outcome: Outcome
    seeds: list[int]

    @property
    def key(self) -> tuple[str, frozenset[str], str]:
        """What makes two minimal failures the same."""
        text = self.outcome.text.splitlines()[0] if self.outcome.kind != "difference" else ""
        return self.outcome.kind, self.case.labels, re.sub(r"[\d.e+-]+", "#", text)[:120]


class Search:
    """Looks for causes: each failing case is explained by what is known, or shrunk to something new."""

    def __init__(self, pool: WorkerPool, say: Callable[[str], None] = print) -> None:
        self.pool, self.say = pool, say
        self.causes: list[Cause] = []
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    def figures(self) -> dict[str, Any]:
        """What was found, to be written down: how many programs ended how, and what broke the promise."""
        failures = [{"kind": each.outcome.kind, "seeds": each.seeds, "script": each.case.script()}
                    for each in self.causes]  # fmt: skip
        return {"outcomes": dict(self.counts), "refusals": dict(self.refusals.most_common()), "failures": failures}

    def over(self, seeds: Iterable[int], make: Callable[[int], Case], shrinks: int = 60) -> None:
        """Runs the cases of these seeds."""
        numbers = list(seeds)
        cases = [make(seed) for seed in numbers]
        failing = []
        for seed, case, outcome in zip(numbers, cases, run(self.pool, cases), strict=True):
            self.counts[outcome.kind] += 1
            if outcome.kind == "refused":
                self.refusals[outcome.text] += 1
            if outcome.failed:
                failing.append((seed, case, outcome))
        for seed, case, outcome in failing:
            self.explain(seed, case, outcome, shrinks)

    def explain(self, seed: int, case: Case, outcome: Outcome, shrinks: int) -> None:
        """Adds a failure to a known cause, or finds a new one."""
        known = [cause for cause in self.causes if cause.case.labels and cause.case.labels <= case.labels]
        if known:
            hidden = frozenset().union(*(cause.case.labels for cause in known))
            rest = case.with_program(piece for piece in case.program if piece.label not in hidden)
            if not self.try_again(rest).failed:
                known[0].seeds.append(seed)
                return
            case = rest
        small, final = self.shrink(case, outcome, shrinks)
        new = Cause(small, final, [seed])
        for cause in self.causes:
            if cause.key == new.key:
                cause.seeds.append(seed)
                return
        self.causes.append(new)
        self.say(f"\nseed {seed}: {final.kind} at `{final.at}`: {final.text}\n{small.script()}")

    def try_again(self, case: Case, times: int = 2) -> Outcome:
        """The first failure of a few runs, with more time for a rank to be late in."""
        slow = dataclasses.replace(case, delay=0.01)
        outcome = Outcome("equal")
        for _ in range(times):
            (outcome,) = run(self.pool, [slow])
            if outcome.failed:
                break
        return outcome

    def shrink(self, case: Case, outcome: Outcome, budget: int) -> tuple[Case, Outcome]:
        """A shorter case that fails too: pieces left out, from large chunks to single ones, then plainer options."""
        best = (case, outcome)

        def attempt(candidate: Case) -> bool:
            nonlocal best, budget
            budget -= 1
            again = self.try_again(candidate)
            if again.failed:
                best = (candidate, again)
            return again.failed

        size = max(1, len(case.program) // 2)
        while size and budget > 0:
            start, changed = 0, False
            while start < len(best[0].program) and budget > 0:
                pieces = best[0].program
                if attempt(best[0].with_program(pieces[:start] + pieces[start + size :])):
                    changed = True
                else:
                    start += size
            size = size if changed and size == 1 else size // 2
        for change in ({"model": "Mlp", "ddp": {}}, {"ddp": {}}, {"optimizer": ("SGD", {"lr": 0.05})}, {"groups": 1},
                       {"second": None}, {"attach": {}}):  # fmt: skip
            if budget > 0 and any(getattr(best[0], name) != value for name, value in change.items()):
                attempt(dataclasses.replace(best[0], **change))
        return best
