"""Runs every benchmark, then makes the report: python -m benchmarks.matrix --size small --out out/bench.

Each benchmark is a command of its own with its own JSON in the output folder; what they are, at each size, is in
tasks.py. One that fails is named at the end, and the others run all the same. An interrupt loses only the cell it
interrupts: --resume goes on from there.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from ..command import Parser, terminal
from .measure import Ended, run
from .show import Overall
from .tasks import PACKAGE, SIZES, Task


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="small takes minutes, full hours")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where results and report go")
    parser.add_argument("--resume", action="store_true", help="keep the finished cells of a run that was interrupted")
    parser.add_argument("--only", metavar="NAMES", help="these tasks of the size, such as training,convergence")
    given = parser.parse_args()
    given.tasks = SIZES[given.size]
    if given.only:
        wanted = given.only.split(",")
        known = {task.name for task in given.tasks}
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"task {unknown[0]!r} is not in size {given.size}: choose from {', '.join(sorted(known))}")
        given.tasks = tuple(task for task in given.tasks if task.name in wanted)
    return given


def run_all(tasks: tuple[Task, ...], folder: Path, resume: bool, console: Console) -> dict[str, Ended]:
    """Every task in turn; how each ended, by name. KeyboardInterrupt ends the running one properly, then all."""
    ended: dict[str, Ended] = {}
    overall = Overall(tasks, console)
    with overall.bar:
        for number, task in enumerate(tasks):
            overall.at(number)
            command = [sys.executable, *task.command(folder, resume)]
            console.print(f"$ {shlex.join(['python', *command[1:]])}", highlight=False, soft_wrap=True)
            ended[task.name] = run(
                command,
                folder / f"{task.name}.log",
                partial(overall.at, number),
                lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            )
    return ended


def main() -> None:
    given = arguments()
    console = terminal()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        ended = run_all(given.tasks, given.out, given.resume, console)
        made = sorted(given.out.glob("*.json"))
        if made:
            command = [sys.executable, "-m", f"{PACKAGE}.report", *map(str, made), "--out", str(given.out / "report")]
            ended["report"] = run(command, given.out / "report.log", lambda *_: None, console.print)
    except KeyboardInterrupt:
        typed = [word for word in sys.argv[1:] if word != "--resume"]
        again = shlex.join(["python", "-m", str(__package__), *typed, "--resume"])
        console.print(f"Interrupted; every finished cell is kept. Go on with: {again}", highlight=False, soft_wrap=True)
        raise SystemExit(130) from None
    failed = {name: end for name, end in ended.items() if end.status != 0}
    for name, end in failed.items():
        console.print(f"{name} failed: {end.reason} (all it said: {end.log})", style="red", highlight=False)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
