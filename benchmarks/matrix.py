"""Runs every benchmark, then makes the report: python -m benchmarks.matrix --size small --out out/bench.

Each benchmark is a command of its own with its own JSON in the output folder; what they are, at each size, is the
table SIZES below. One that fails is named at the end, and the others run all the same. An interrupt loses only the
cell it interrupts: --resume goes on from there.
"""

import argparse
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.command import Parser, terminal
from benchmarks.subcommand import RESUMED, Ended, run

JSON, FOLDER = "{json}", "{folder}"


@dataclass(frozen=True)
class Task:
    """One benchmark. `arguments` as typed, with {json} or {folder} where its results go."""

    name: str  # of its JSON
    module: str  # benchmarks.<module>
    arguments: str
    minutes: float  # expected, until the first ones are measured: it only weighs the tasks against each other
    resumable: bool = True

    def command(self, folder: Path, resume: bool = False) -> list[str]:
        places = {JSON: str(folder / f"{self.name}.json"), FOLDER: str(folder)}
        words = [places.get(word, word) for word in shlex.split(self.arguments)]
        return ["-m", f"benchmarks.{self.module}", *words, *(["--resume"] if resume and self.resumable else [])]


OTHERS = (
    "fsdp2,dear,bf16:4,acp:4,power:4,topk:0.01,sign,dear+bf16,dear+acp:4,dear+power:4,dear+power:8,dear+sign,"
    "dear+topk:0.01"
)
# The best bucket size of DDP depends on the rate, and DDP is to have it: sizes that are left out were never the best in
# any run of benchmarks/results at such rates.
SLOW, MIDDLE, FAST = (
    f"none,{buckets},{OTHERS}"
    for buckets in (
        "ddp:1,ddp:2,ddp:4,ddp+fp16:1,ddp+fp16:4",
        "ddp:2,ddp:4,ddp:8,ddp+fp16:2,ddp+fp16:4,ddp+fp16:8",
        "ddp:2,ddp:4,ddp:8,ddp:25,ddp+fp16:4,ddp+fp16:25",
    )
)
DIGITS = "none,ddp:1,ddp:25,ddp+fp16:1,ddp+powersgd:4,dear,bf16,acp:4,power:4,topk:0.01,sign,dear+acp:4,dear+sign"
POWERSGD = "ddp+powersgd:4"  # torch's hook, which with four workers aborts
TURNS = "--rounds 4 --warmup 1 --steps 2"
FOUR = "--workers 4 --batch 2"
FAST_RATES = "2.5gbit,10gbit,unlimited"
COLLECTIVES = "-b 64K -e 64M -f 4 -n 3 --rounds 3"

SIZES: dict[str, tuple[Task, ...]] = {
    "small": (
        Task("kernels", "kernels", "--numel 4194304 --rounds 5 --json {json}", 0.1),
        Task("collectives", "collectives", "-b 1M -e 4M -f 4 -n 2 --rounds 2 --rates 1gbit --json {json}", 0.6),
        Task(
            "training",
            "training",
            "--strategies none,ddp:1,ddp:25,ddp+fp16:4,dear,bf16:4,acp:4,sign --rates 500mbit,1gbit "
            "--rounds 2 --warmup 1 --steps 2 --breakdown --json {json}",
            3.7,
        ),
        Task(
            "training-again",
            "training",
            "--strategies none,ddp:1,ddp+fp16:4,dear,acp:4 --rates 1gbit --rounds 2 --warmup 1 --steps 2 --json {json}",
            0.8,
        ),
        Task(
            "convergence",
            "convergence",
            "--strategies ddp,acp:4,sign --seeds 1 --steps 20 --held-out-every 5 --held-out-examples 16 --json {json}",
            0.9,
        ),
        Task(
            "bandwidth",
            "bandwidth",
            "--strategies ddp:1,acp:4 --rates 2.5gbit,500mbit --rounds 2 --steps 2 --json {json}",
            0.8,
        ),
    ),
    # A step of dense DDP takes four to six seconds at 100 Mbit/s, and differs little from the next: few will do.
    "full": (
        Task("kernels", "kernels", "--rounds 21 --json {json}", 0.7),
        Task(
            "collectives-slow",
            "collectives",
            "-b 64K -e 4M -f 4 -n 2 --rounds 3 --workers 2,4 --rates 100mbit,500mbit --json {json}",
            12,
        ),
        Task(
            "collectives", "collectives", f"{COLLECTIVES} --workers 2,4 --rates 1gbit,{FAST_RATES} --json {{json}}", 30
        ),
        Task("collectives-again", "collectives", f"{COLLECTIVES} --rates 1gbit --json {{json}}", 5),
        Task(
            "training-2-slow",
            "training",
            f"--strategies {SLOW},{POWERSGD} --rates 100mbit --rounds 4 --warmup 1 --steps 1 --json {{json}}",
            8,
        ),
        Task(
            "training-2",
            "training",
            f"--strategies {MIDDLE},{POWERSGD} --rates 500mbit,1gbit {TURNS} --breakdown --json {{json}}",
            13.5,
        ),
        Task(
            "training-2-fast",
            "training",
            f"--strategies {FAST},{POWERSGD} --rates {FAST_RATES} {TURNS} --json {{json}}",
            11.5,
        ),
        Task(
            "training-4-slow",
            "training",
            f"--strategies {SLOW} {FOUR} --rates 100mbit --rounds 3 --warmup 1 --steps 1 --json {{json}}",
            15,
        ),
        Task(
            "training-4",
            "training",
            f"--strategies {MIDDLE} {FOUR} --rates 500mbit,1gbit {TURNS} --breakdown --json {{json}}",
            16.5,
        ),
        Task(
            "training-4-fast",
            "training",
            f"--strategies {FAST} {FOUR} --rates {FAST_RATES} {TURNS} --json {{json}}",
            19,
        ),
        Task(
            "training-again",
            "training",
            f"--strategies {MIDDLE},{POWERSGD} --rates 1gbit {TURNS} --json {{json}}",
            5,
        ),
        Task(
            "digits",
            "training",
            f"--workload digits --strategies {DIGITS} --rates 100mbit,1gbit --seeds 1,2,3 --rounds 10 --warmup 2 "
            "--steps 10 --json {json}",
            3,
        ),
        Task(
            "convergence",
            "convergence",
            "--strategies ddp,bf16,acp:4,acp:8,power:4,power:8,topk:0.01,sign --seeds 1,2,3 --steps 300 --json {json}",
            65,
        ),
        Task("bandwidth", "bandwidth", f"{FOUR} --json {{json}}", 30),
        Task("demo", "demo", "--out {folder}", 3, resumable=False),
    ),
}


def example(benchmark: str, folder: Path = Path("out")) -> str:
    """A command that makes a benchmark's results, for people to copy."""
    task = next(task for task in SIZES["full"] if task.module == benchmark)
    return shlex.join(["python", *task.command(folder)])


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

    def at(self, number: int, share: float, doing: str = "") -> None:
        """`share` of the task of that number (from 0) is done."""
        done = sum(task.minutes for task in self.tasks[:number]) + share * self.tasks[number].minutes
        whole = sum(task.minutes for task in self.tasks)
        if doing == RESUMED:
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


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.matrix", description="Runs every benchmark, then makes the report.")
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
            overall.at(number, 0)
            command = [sys.executable, *task.command(folder, resume)]
            console.print(f"$ {shlex.join(['python', *command[1:]])}", highlight=False, soft_wrap=True)
            ended[task.name] = run(
                command,
                folder / f"{task.name}.log",
                lambda share, doing, number=number: overall.at(number, share, doing),  # type: ignore[misc]
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
            command = [sys.executable, "-m", "benchmarks.report", *map(str, made), "--out", str(given.out / "report")]
            ended["report"] = run(command, given.out / "report.log", lambda *_: None, console.print)
    except KeyboardInterrupt:
        typed = [word for word in sys.argv[1:] if word != "--resume"]
        again = shlex.join(["python", "-m", "benchmarks.matrix", *typed, "--resume"])
        console.print(f"Interrupted; every finished cell is kept. Go on with: {again}", highlight=False, soft_wrap=True)
        raise SystemExit(130) from None
    failed = {name: end for name, end in ended.items() if end.status != 0}
    for name, end in failed.items():
        console.print(f"{name} failed: {end.reason} (all it said: {end.log})", style="red", highlight=False)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
