"""Runs the tasks one after another within the time of a call, and stores each as soon as it has ended."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..matrix.measure import SECONDS_TO_END, Ended, run
from ..progress import Part, Report, Step
from ..store import Store
from . import outcomes
from .tasks import Task

# What pytest's exit code says: tests failed, which is a result; and none was left to run.
RESULTS_OF_TESTS = (0, 1, 5)


@dataclass(frozen=True)
class Experiment:
    """What a task's cell in the file was made by."""

    arguments: list[str]


class Unfinished(Exception):
    """A task has no result yet. The message says why."""


@dataclass
class Call:
    """One call of the command."""

    tasks: list[Task]
    minutes: float
    folder: Path
    store: Store
    resume: bool  # an earlier call's files go on
    console: Console

    def __post_init__(self) -> None:
        again = {task.name for task in self.tasks if task.every_call}
        self.store.resumed = [cell for cell in self.store.resumed if cell["task"] not in again]
        self.store.payload["cells"] = list(self.store.resumed)

    def run(self) -> dict[str, str]:
        """What became of each task, by name: a sentence; empty where it is done."""
        begun, became = time.monotonic(), dict[str, str]()
        for number, task in enumerate(self.tasks, 1):
            left = self.minutes * 60 - (time.monotonic() - begun)
            became[task.name] = self._one(task, Part(number, len(self.tasks)), left)
            if task.every_call and became[task.name]:
                break
        return became

    def _one(self, task: Task, part: Part, left: float) -> str:
        """left: seconds of the call, whose last ones are kept for an interrupted task to end in."""
        where, experiment = {"task": task.name}, Experiment(list(task.arguments))
        limit = min(left - SECONDS_TO_END, task.share * self.minutes * 60)
        if self.store.find(where, experiment) is None and limit <= task.minutes * 60:
            return f"not begun: it takes {task.minutes:g} min, and there were {max(limit, 0) / 60:.1f}"
        try:
            self.store.obtain(where, experiment, part, task.name, partial(self._measure, task, limit), self.console)
        except Unfinished as why:
            return str(why)
        return ""

    def _measure(self, task: Task, limit: float, report: Report) -> dict[str, Any]:
        results, log, begun = self.folder / task.results, self.folder / f"{task.name}.log", time.monotonic()
        if task.results and not self.resume:
            results.unlink(missing_ok=True)  # of an earlier run that is not to go on

        def follow(step: Step) -> None:
            report(step.done, step.total, step.doing)

        env = {**task.env, **({outcomes.FILE: str(results)} if task.tests else {})}
        ended = run(task.command(self.folder, self.resume), log, follow, self._say, limit, env)
        if why := unfinished(task, ended, results):
            raise Unfinished(why)
        return {
            "plan": asdict(Experiment(list(task.arguments))),
            "seconds": round(time.monotonic() - begun, 1),
            **({"file": task.results} if task.results else {}),
            **(outcomes.summary(results) if task.tests else {}),
        }

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def unfinished(task: Task, ended: Ended, results: Path) -> str:
    """Why a task has no result yet; empty where it has one. Of tests at least one must have ended, in this call or an
    earlier one: an interpreter that has no pytest ends with the status of failed tests."""
    if ended.cut:
        return "interrupted when its time was over"
    if ended.status in (RESULTS_OF_TESTS if task.tests else (0,)) and (not task.tests or outcomes.read(results)):
        return ""
    return f"failed: {ended.reason} (all it said: {ended.log.name})"
