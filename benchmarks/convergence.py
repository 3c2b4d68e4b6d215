"""Loss by step, without timing: python -m benchmarks.convergence. What a compressor costs in training progress.

One strategy and seed after the other, each with a fresh model in fresh workers, on loopback: how fast they ran means
nothing. With --json every finished pair is kept at once, and --resume goes on where an interrupt has left off.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import losses, results
from benchmarks.command import Parser, fail, positive, terminal
from benchmarks.crew import Crew
from benchmarks.data import standard_library
from benchmarks.gpt import GPTConfig, build_gpt
from benchmarks.launch import Report, WorkersFailed, progress_bar, run_workers, worker
from benchmarks.network import LOOPBACK, NetworkError, open_network
from benchmarks.strategies import FORMS, OPTIMIZERS, StrategyError, Trainer, optimizer_factory, parse_strategies
from benchmarks.strategies import parse_strategy as parse

STRATEGIES = "ddp,acp:8,power:8,topk:0.01,sign"
SECONDS_PER_STEP = 20  # far more than any step takes: a pair that needs longer is stuck
WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Course:
    """What one pair of strategy and seed trains."""

    strategy: str
    seed: int
    steps: int
    batch: int  # sequences per worker and step
    optimizer: str
    learning_rate: float | None  # None: the optimizer's default here
    held_out_every: int  # steps between two looks at the held-out loss; the last step always has one
    held_out_windows: int  # of which each rank reads its share


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--strategies", default=STRATEGIES, help=f"comma-separated, of: {FORMS}")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3], help="such as 1,2,3")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--batch", type=positive, default=4, help="sequences per worker and step")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adamw")
    parser.add_argument("--lr", type=_rate, help="learning rate, the same for every strategy")
    parser.add_argument("--held-out-every", type=positive, default=50, metavar="STEPS")
    parser.add_argument("--held-out-windows", type=positive, default=128, help="sequences of held-out text")
    parser.add_argument("--json", type=Path, help="where the losses go")
    parser.add_argument("--resume", action="store_true", help="skip what --json has already")
    given = parser.parse_args()
    if given.resume and not given.json:
        parser.error("--resume needs --json, the file to go on with")
    try:
        given.strategies = [strategy.name for strategy in parse_strategies(given.strategies)]
    except StrategyError as error:
        parser.error(str(error))
    return given


def _seeds(text: str) -> list[int]:
    found = [positive(part.strip()) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return found


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return rate


def measure(crew: Crew, plan: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one pair: trains, and returns what rank 0 keeps."""
    course = Course(**plan)
    text, sequence = standard_library(), GPTConfig().sequence
    group = crew.group()
    own: list[float] = []
    held_out: list[tuple[int, float]] = []  # this rank's share, by steps done

    def build() -> Trainer:
        factory = optimizer_factory(course.optimizer, course.learning_rate)
        return parse(course.strategy).build(build_gpt(course.seed), factory, group)

    def look(trainer: Trainer) -> float:
        inputs, targets = text.held_out_batch(course.held_out_windows, sequence)
        mine = range(crew.rank, course.held_out_windows, crew.world)
        parts = [list(mine[at : at + WINDOWS_AT_ONCE]) for at in range(0, len(mine), WINDOWS_AT_ONCE)]
        trainer.synchronize()
        return sum(trainer.evaluate(inputs[part], targets[part]) * len(part) for part in parts) / len(mine)

    def train() -> dict[str, Any]:
        trainer = build()
        for step in range(course.steps):
            batch = text.batch(
                step, rank=crew.rank, world=crew.world, batch=course.batch, sequence=sequence, seed=course.seed
            )
            own.append(trainer.step(*batch))
            if (step + 1) % course.held_out_every == 0 or step + 1 == course.steps:
                held_out.append((step + 1, look(trainer)))
            if crew.rank == 0:
                report(step + 1, course.steps, f"training {course.strategy}")
        account = trainer.compressor_stats()
        trainer.close()
        return account

    account, failure = crew.attempt(train)
    shares = [len(range(rank, course.held_out_windows, crew.world)) for rank in range(crew.world)]
    looks = zip(*crew.gather(held_out), strict=False)
    return {
        "plan": plan,
        "workers": crew.world,
        "failure": failure,
        "text": {"bytes": len(text.train), "digest": text.digest},
        "losses": [round(sum(step) / len(step), 6) for step in zip(*crew.gather(own), strict=False)],  # mean over ranks
        "held_out": [
            [look[0][0], round(sum(n * loss for n, (_, loss) in zip(shares, look, strict=True)) / sum(shares), 6)]
            for look in looks
        ],
        "compressor": account or {},  # rank 0's, of the last step
    }


def main() -> None:
    given = arguments()
    courses = [
        Course(
            name,
            seed,
            given.steps,
            given.batch,
            given.optimizer,
            given.lr if given.lr is not None else OPTIMIZERS[given.optimizer][1],
            given.held_out_every,
            given.held_out_windows,
        )
        for seed in given.seeds  # so that all strategies can be compared before the second seed is begun
        for name in given.strategies
    ]
    console = terminal()
    payload = results.header("convergence", {"workers": given.workers})
    payload["cells"] = kept(given.json, given.workers, courses) if given.resume else []
    if payload["cells"]:
        console.print(f"{len(payload['cells'])} of {len(courses)} pairs are in {given.json} already.", highlight=False)
    done = {_pair(cell["plan"]) for cell in payload["cells"]}
    try:
        with open_network(LOOPBACK, given.workers) as network:
            train_all([one for one in courses if _pair(asdict(one)) not in done], network.lab, payload, given, console)
    except (NetworkError, WorkersFailed) as error:
        fail(str(error))
    losses.show(payload["cells"], console)
    if given.json:
        console.print(f"Raw losses: {given.json}")


def train_all(
    courses: list[Course], lab: Any, payload: dict[str, Any], given: argparse.Namespace, console: Console
) -> None:
    """One course after the other; each is kept before the next is begun."""
    start = time.monotonic()
    with progress_bar(console, "convergence") as report:
        for number, course in enumerate(courses):
            name = f"{course.strategy}, seed {course.seed}"

            def progress(step: int, steps: int, _: str, number: int = number, name: str = name) -> None:
                report(number * steps + step, len(courses) * steps, name)

            try:
                limit = 60 + SECONDS_PER_STEP * course.steps
                cell = run_workers(lab, "benchmarks.convergence", course, progress, timeout=limit)
            except WorkersFailed as error:
                cell = {"plan": asdict(course), "workers": given.workers, "failure": str(error)}
            payload["cells"].append(cell)
            if given.json:
                results.write(given.json, payload)
            left = (time.monotonic() - start) / (number + 1) * (len(courses) - number - 1) / 60
            end = cell["failure"] or f"held-out loss {cell['held_out'][-1][1]:.4f}"
            console.print(f"{name}: {end}; about {left:.0f} min left.", highlight=False)


def _pair(plan: dict[str, Any]) -> tuple[str, int]:
    return plan["strategy"], plan["seed"]


def kept(path: Path, workers: int, courses: list[Course]) -> list[dict[str, Any]]:
    """The finished pairs of a file that --resume goes on with; failed ones are tried again. Fails where they were
    trained otherwise than now."""
    if not path.exists():
        return []
    try:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if not cell["failure"]]
        wanted = {_pair(asdict(course)): asdict(course) for course in courses}
        for cell in cells:
            now = wanted.get(_pair(cell["plan"]))
            if now is not None and (cell["plan"] != now or cell["workers"] != workers):
                name, seed = _pair(cell["plan"])
                fail(f"{path} has {name} with seed {seed} trained with other settings: give another --json.")
    except (ValueError, KeyError, TypeError):
        fail(f"{path} holds no losses to go on with: give another --json.")
    return cells


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), measure)
    else:
        main()
