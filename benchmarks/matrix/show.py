"""How far all tasks are, together."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..progress import Step
from .tasks import Task

BEGUN = Step(0, 1, "")


class Overall:
    """Progress over all tasks, each weighed by how long it is expected to take."""

    def __init__(self, tasks: tuple[Task, ...], console: Console) -> None:
        self.tasks, self.console = tasks, console
        self.begun = time.monotonic()
        self.done = 0.0  # in expected minutes
        self.resumed = 0.0  # of these, what took no time, since an earlier run had done it
        self.said = -1, ""  # task, share of all
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.line: TaskID = self.bar.add_task("starting", total=sum(task.minutes for task in tasks), left="")

    def at(self, number: int, step: Step = BEGUN) -> None:
        """The task of that number (from 0) is at that step."""
        share, doing = step.share, step.doing
        done = sum(task.minutes for task in self.tasks[:number]) + share * self.tasks[number].minutes
        whole = sum(task.minutes for task in self.tasks)
        if step.resumed:
            self.resumed += max(done - self.done, 0)
        self.done = done
        left = remaining(time.monotonic() - self.begun, done - self.resumed, whole - done)
        title = f"{number + 1} of {len(self.tasks)}: {self.tasks[number].name}{' · ' if doing else ''}{doing}"
        self.bar.update(self.line, completed=done, description=title, left=left)
        if not self.console.is_terminal:
            percent = f"{100 * done / whole:.0f}% of all"
            if (number, percent) != self.said:  # in a file, a hundred lines will do
                self.console.print(f"{title} · {percent} · {left}", highlight=False)
            self.said = number, percent


def remaining(elapsed: float, measured: float, left: float) -> str:
    """What is left, for people: as much slower than expected as what was measured in `elapsed` seconds.

    `measured` and `left` are in expected minutes.
    """
    minutes = elapsed / 60 / measured * left if measured > 0 else left
    return f"about {minutes:.0f} min left" if minutes >= 1 else "under a minute left"
