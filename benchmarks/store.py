"""Where the cells of a run are kept: a file that grows by one cell at a time, and from which a later run goes on.

Needs nothing of the library that is measured: whoever builds it keeps results here, too (benchmarks.gpu).
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from . import progress, records
from .command import fail
from .progress import Part, Report

# What a second try adds to an experiment when a candidate took its worker down: a finding, and no other experiment.
FOUND = "excluded"
# What must be the same for two cells to stand in one file.
SAME = ("benchmark", "schema", "commit", "machine", "versions")


class Differs(ValueError):
    """The file that is to be resumed holds something else; the message says what, and what to do."""


@dataclass
class Store:
    """The cells of one run, in a file where `path` is given. Rank 0 has one, or the process that starts the workers.

    A cell is what a benchmark measured, its "plan", and what tells it from the others of the file.
    """

    payload: dict[str, Any]
    path: Path | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)  # cells found in the file

    @classmethod
    def open(cls, header: dict[str, Any], path: Path | None, resume: bool) -> "Store":
        """Begins with no cell, or, to `resume`, with those of the file, if there is one.

        Raises Differs if the file is of another benchmark, commit, machine or version, or none was named to resume.
        """
        store = cls(header | {"cells": []}, path)
        if resume and path is None:
            raise Differs("There is nothing to resume without a file: name it with --json.")
        if not resume or path is None or not path.exists():
            return store
        try:
            before = json.loads(path.read_text())
            store.resumed = before["cells"]
            found = {name: before[name] for name in SAME}
        except (ValueError, KeyError, TypeError) as error:
            raise Differs(
                f"{path} holds no results of a benchmark, so it cannot be resumed: name another file with --json."
            ) from error
        for name in SAME:
            if found[name] != header[name]:
                raise Differs(
                    f"{path} was measured with another {name} ({difference(found[name], header[name])}), so it cannot "
                    "be resumed: leave out --resume to begin anew, or name another file with --json."
                )
        store.payload["cells"] = list(store.resumed)
        return store

    def find(self, where: Mapping[str, Any], experiment: Any) -> dict[str, Any] | None:
        """The cell that was resumed for this, if there is one. Raises Differs if it had another experiment.

        where: what tells the cell from the others of the file; what is "" there, the cell does not have.
        """
        for cell in self.resumed:
            if any(cell.get(name, "") != value for name, value in where.items()):
                continue
            then, now = ({k: v for k, v in one.items() if k != FOUND} for one in (cell["plan"], asdict(experiment)))
            if then != now:
                known = ", ".join(f"{name} {value}" for name, value in where.items() if value != "")
                raise Differs(
                    f"{self.path} holds {known}, with another experiment ({difference(then, now)}), so it cannot be "
                    "resumed: give the same options, or name another file with --json."
                )
            return cell
        return None

    def obtain(
        self,
        where: Mapping[str, Any],
        experiment: Any,
        part: Part,
        title: str,
        measure: Callable[[Report], dict[str, Any]],
        console: Console,
    ) -> dict[str, Any]:
        """The cell that the file holds already, or else one measured now, with `where` in it, and stored."""
        cell = self.find(where, experiment)
        if cell is not None:
            progress.resumed(console, f"{part}: {title}", part)
            return cell
        with progress.bar(console, f"{part}: {title}", part) as report:
            cell = {name: value for name, value in where.items() if value != ""} | measure(report)
        self.payload["cells"].append(cell)
        self.write()
        return cell

    def write(self) -> None:
        """Writes the file, after each cell: an interrupt loses only the cell it interrupts."""
        if self.path:
            records.write(self.path, self.payload)


def difference(then: Any, now: Any, name: str = "") -> str:
    """The first difference of two values of JSON, for people: "rounds: 4 then, 8 now"; empty if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = (difference(then.get(k), now.get(k), f"{name}.{k}".strip(".")) for k in sorted(then.keys() | now))
        return next(filter(None, found), "")
    return "" if then == now else f"{name}: {then} then, {now} now".removeprefix(": ")


@contextmanager
def ended_by_a_sentence(path: Path | None, *also: type[Exception]) -> Iterator[None]:
    """What ends a benchmark early is said in one sentence on stderr, and ends the program: a file that differs, an
    interrupt, and `also` these."""
    said: tuple[type[Exception], ...] = (Differs, *also)
    try:
        yield
    except said as error:
        fail(str(error))
    except KeyboardInterrupt:
        stored = f"; finished cells are in {path}, and --resume goes on from there" if path else ""
        print(f"Interrupted{stored}.", file=sys.stderr)
        raise SystemExit(130) from None
