"""Starts a benchmark's workers on the lab, follows their progress, and brings back what rank 0 measured.

Workers and command talk through a folder: plan.json goes in, events.jsonl grows while they work, result.json comes out.
Files reach into network namespaces, whatever the rate is set to, and take nothing from the link that is measured.
"""

import dataclasses
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.crew import Crew
from benchmarks.results import ROOT

POLL_SECONDS = 0.1

Report = Callable[[int, int, str], None]  # done, in all, what is being done


class WorkersFailed(RuntimeError):
    """The workers ended without a result. `doing` is the last thing rank 0 said it was about to do."""

    def __init__(self, reason: str, doing: str) -> None:
        super().__init__(f"The workers ended without a result while {doing or 'starting'}: {reason}")
        self.reason = reason
        self.doing = doing


def run_workers(lab: Any, module: str, plan: Any, report: Report, timeout: float) -> dict[str, Any]:
    """Runs `python -m module` on every worker of an open lab; returns the dict that rank 0 measured.

    `plan` is a dataclass of plain values. Raises WorkersFailed when the workers end, or are ended after `timeout`
    seconds, without a result.
    """
    with tempfile.TemporaryDirectory(prefix="dear-bench-") as folder:
        spool = Path(folder)
        (spool / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))
        failures: list[BaseException] = []
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

        def work() -> None:
            try:
                lab.run([sys.executable, "-m", module, "--worker", folder], env=environment, timeout=timeout)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="lab", daemon=True)
        thread.start()
        events = _Events(spool / "events.jsonl")
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            for event in events.new():
                report(*event)
        for event in events.new():
            report(*event)
        result = spool / "result.json"
        if failures or not result.exists():
            raise WorkersFailed(str(failures[0]) if failures else "rank 0 wrote no result", events.doing)
        return json.loads(result.read_text())


class _Events:
    """Reads whole lines as they are appended to a file that may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.doing = path, 0, ""

    def new(self) -> Iterator[tuple[int, int, str]]:
        if not self.path.exists():
            return
        with open(self.path) as lines:
            lines.seek(self.position)
            while (line := lines.readline()).endswith("\n"):
                self.position = lines.tell()
                done, total, self.doing = json.loads(line)
                yield done, total, self.doing


def worker(spool: Path, measure: Callable[[Crew, dict[str, Any], Report], dict[str, Any]]) -> None:
    """The other end of run_workers: what a worker module does when it is run with --worker and the spool folder."""
    crew = Crew()
    with open(spool / "events.jsonl", "a") as events:

        def report(done: int, total: int, doing: str) -> None:
            if crew.rank == 0:
                events.write(json.dumps([done, total, doing]) + "\n")
                events.flush()

        result = measure(crew, json.loads((spool / "plan.json").read_text()), report)
    if crew.rank == 0:
        (spool / "result.json").write_text(json.dumps(result))
    crew.leave()


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Report]:
    """A bar with the time that remains; where the output is no terminal, a line each time the work changes."""
    if not console.is_terminal:
        last = [""]

        def lines(done: int, total: int, doing: str) -> None:
            if doing != last[0]:
                last[0] = doing
                console.print(f"{title} · {100 * done // max(total, 1):3d}% · {doing}")

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
