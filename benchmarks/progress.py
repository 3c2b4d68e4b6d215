"""How far work is: between processes as lines of JSON, to people as a bar or, in a file, as lines of text.

A process that is told to by the environment (`as_json`) writes each report as one JSON object on a line of its own;
`read` returns it to the process that reads this output.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int, str], None]  # done, in all, what is being done

_AS_JSON = "DEAR_BENCH_PROGRESS"
as_json = {_AS_JSON: "json"}


@dataclass(frozen=True)
class Part:
    """The cell that work belongs to, such as the second of six."""

    number: int = 1
    of: int = 1
    most: bool = False  # there may be fewer

    def __str__(self) -> str:
        return f"cell {self.number} of {'at most ' if self.most else ''}{self.of}"


@dataclass(frozen=True)
class Step:
    """One report: `done` of `total` steps of a part."""

    done: int
    total: int
    doing: str
    part: Part = Part()
    resumed: bool = False  # it took no time: an earlier run had done it

    @property
    def share(self) -> float:
        """Of everything, 0 to 1."""
        return (self.part.number - 1 + self.done / max(self.total, 1)) / self.part.of


def write(step: Step) -> None:
    """Reports to the process that reads this process's output."""
    print(json.dumps({"progress": asdict(step)}), flush=True)


def read(line: str) -> Step | None:
    """The report that a line holds; None for any other line."""
    if not line.startswith('{"progress":'):
        return None
    told = json.loads(line)["progress"]
    return Step(**{**told, "part": Part(**told["part"])})


def resumed(console: Console, title: str, part: Part) -> None:
    """Says that a part was done by an earlier run."""
    if _AS_JSON in os.environ:
        write(Step(1, 1, "resumed", part, resumed=True))
    console.print(f"{title}: resumed", highlight=False)


@contextmanager
def bar(console: Console, title: str, part: Part | None = None) -> Iterator[Report]:
    """A bar with the time that remains; where the output is no terminal, a line each time the work changes."""
    part = part or Part()
    if _AS_JSON in os.environ and not console.quiet:
        yield lambda done, total, doing: write(Step(done, total, doing, part))
        return
    if not console.is_terminal:
        last, begun = "", time.monotonic()

        def lines(done: int, total: int, doing: str) -> None:
            nonlocal last
            if doing == last:
                return
            last = doing
            left = (time.monotonic() - begun) * (total - done) / done if done else None
            remains = "" if left is None else f" · about {left:.0f} s left"
            console.print(f"{title} · {100 * done // max(total, 1):3d}% · {doing}{remains}", highlight=False)

        yield lines
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True
    ) as shown:
        task = shown.add_task(title, total=None)

        def draw(done: int, total: int, doing: str) -> None:
            shown.update(task, completed=done, total=total, description=f"{title} · {doing}")

        yield draw
