"""Starts a benchmark's workers on the lab, follows their progress, and brings back what rank 0 measured.

The plan goes in and the result comes out as files, which reach into network namespaces whatever the rate is set to and
take nothing from the link that is measured; progress comes as marked lines on rank 0's standard output.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.collectives import mpi
from benchmarks.crew import Crew, end_at_once
from benchmarks.netlab import Lab, Loopback
from benchmarks.records import ROOT

PROGRESS = "@progress "

Report = Callable[[int, int, str], None]  # done, in all, what is being done


class WorkersFailed(RuntimeError):
    """The workers ended without a result. `doing` is the last thing rank 0 said it was about to do."""

    def __init__(self, reason: str, doing: str) -> None:
        super().__init__(f"The workers ended without a result while {doing or 'starting'}: {reason}")
        self.reason = reason
        self.doing = doing


def run_workers(
    lab: Lab | Loopback, module: str, plan: Any, report: Report, timeout: float, launcher: mpi.Launcher | None = None
) -> dict[str, Any]:
    """Runs `python -m module` on every worker of an open lab; returns the dict that rank 0 measured.

    `plan` is a dataclass of plain values. With a `launcher`, it is that MPI which starts the workers. Raises
    WorkersFailed when the workers end, or are ended after `timeout` seconds, without a result.
    """
    doing = ""

    def follow(rank: int, line: str) -> None:
        nonlocal doing
        if rank == 0 and line.startswith(PROGRESS):
            done, total, doing = json.loads(line.removeprefix(PROGRESS))
            report(done, total, doing)

    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory(prefix="dear-bench-") as folder:
        (Path(folder) / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))
        try:
            command, ranks = [sys.executable, "-m", module, "--worker", folder], None
            with ExitStack() as stack:
                if launcher is not None:
                    command, added = stack.enter_context(mpi.command(launcher, lab, command))
                    environment, ranks = environment | added, [0]
                lab.run(command, env=environment, timeout=timeout, on_line=follow, ranks=ranks)
            return json.loads((Path(folder) / "result.json").read_text())
        except (RuntimeError, TimeoutError, FileNotFoundError) as error:
            raise WorkersFailed(_short(str(error)), doing) from error


def run_surviving(plan: Any, contestants: Sequence[str], run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`run(plan)`; a contestant that takes its worker down is left out of a second try, and its row says why.

    What workers say they are doing must end in the contestant's name. `plan` is a dataclass whose `excluded` holds the
    contestants that are left out, and why. Raises WorkersFailed where none of them is to blame.
    """
    while True:
        try:
            return run(plan)
        except WorkersFailed as error:
            culprit = (error.doing.split() or [""])[-1]
            if culprit not in contestants or culprit in plan.excluded:
                raise
            why = f"took its worker down while {error.doing}: {error.reason}"
            plan = dataclasses.replace(plan, excluded={**plan.excluded, culprit: why})


def _short(text: str) -> str:
    """First and last line of a report that ends in somebody's standard error: what happened, and what it said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else "no reason given"


def worker(spool: Path, measure: Callable[[Crew, dict[str, Any], Report], dict[str, Any]]) -> None:
    """The other end of run_workers: what a worker module does when it is run with --worker and the spool folder."""
    plan = json.loads((spool / "plan.json").read_text())
    crew = Crew(plan.get("backend", "gloo"), plan.get("device", "cpu"))

    def report(done: int, total: int, doing: str) -> None:
        print(PROGRESS + json.dumps([done, total, doing]), flush=True)

    result = measure(crew, plan, report)
    if crew.rank == 0:
        (spool / "result.json").write_text(json.dumps(result))
    crew.leave()
    # DDP keeps the default group, and with it gloo's threads: one that, on a busy machine, has yet to drop a tensor
    # when the interpreter ends takes the process down ("terminate called without an active exception").
    end_at_once()


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Report]:
    """A bar with the time that remains; where the output is no terminal, a line each time the work changes."""
    if not console.is_terminal:
        last, begun = [""], time.monotonic()

        def lines(done: int, total: int, doing: str) -> None:
            if doing == last[0]:
                return
            last[0] = doing
            left = (time.monotonic() - begun) * (total - done) / done if done else None
            remains = "" if left is None else f" · about {left:.0f} s left"
            console.print(f"{title} · {100 * done // max(total, 1):3d}% · {doing}{remains}", highlight=False)

        yield lines
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(title, total=None)

        def draw(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} · {doing}")

        yield draw
