"""Loss by step, without timing: python -m benchmarks.convergence. What a compressor costs in training progress.

One strategy and seed after the other, each with a fresh model in fresh workers, on loopback unless told otherwise: how
fast they ran means nothing. With --json every finished pair is kept at once, and --resume goes on with the rest.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from benchmarks import cells, losses
from benchmarks.command import UNLIMITED, Parser, number, positive, seed_list, terminal
from benchmarks.crew import Crew
from benchmarks.launch import Report, WorkersFailed, run_workers
from benchmarks.network import LOOPBACK, Network
from benchmarks.strategies import FORMS, OPTIMIZERS, StrategyError, Trainer, optimizer_factory, parse_strategies
from benchmarks.strategies import parse_strategy as parse
from benchmarks.workloads import WORKLOADS

STRATEGIES = "ddp,acp:8,power:8,topk:0.01,sign"
SECONDS_PER_STEP = 20  # far more than any step takes: a pair that needs longer is stuck
AT_ONCE = 32  # held-out examples in one forward pass


@dataclass(frozen=True)
class Course:
    """What one pair of strategy and seed trains."""

    strategy: str
    seed: int
    workload: str
    steps: int
    batch: int  # examples per worker and step
    optimizer: str
    learning_rate: float
    held_out_every: int  # steps between two looks at the held-out loss; the last step always has one
    held_out_examples: int  # of which each rank reads its share
    backend: str = "gloo"
    device: str = "cpu"


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.convergence", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--strategies", default=STRATEGIES, help=f"comma-separated, of: {FORMS}")
    parser.add_argument("--seeds", type=seed_list, default=[1, 2, 3], help="such as 1,2,3")
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--lr", type=number, help="learning rate, the same for every strategy")
    parser.add_argument("--held-out-every", type=positive, default=50, metavar="STEPS")
    parser.add_argument("--held-out-examples", type=positive, default=128, metavar="COUNT")
    cells.options(parser)
    parser.set_defaults(network=LOOPBACK, rates=[UNLIMITED])
    given = parser.parse_args()
    try:
        given.strategies = [strategy.name for strategy in parse_strategies(given.strategies)]
    except StrategyError as error:
        parser.error(str(error))
    return given


def courses(given: argparse.Namespace) -> dict[str, Course]:
    """One for each pair, by name: all strategies can be compared before the second seed is begun."""
    return {
        f"{name} seed {seed}": Course(
            name,
            seed,
            given.workload,
            given.steps,
            given.batch or WORKLOADS[given.workload].batch,
            given.optimizer,
            given.lr if given.lr is not None else OPTIMIZERS[given.optimizer][1],
            given.held_out_every,
            given.held_out_examples,
            given.backend,
            given.device,
        )
        for seed in given.seeds
        for name in given.strategies
    }


def measure(crew: Crew, plan: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one pair: trains, and returns what rank 0 keeps."""
    course = Course(**plan)
    workload, group = WORKLOADS[course.workload], crew.group()
    own: list[float] = []
    looks: list[tuple[int, int, float]] = []  # steps done, examples of this rank's share, their mean loss

    def build() -> Trainer:
        net = workload.build_seeded(course.seed).to(crew.device)
        trainer = parse(course.strategy).build(net, optimizer_factory(course.optimizer, course.learning_rate), group)
        trainer.loss = workload.loss
        return trainer

    def look(trainer: Trainer, step: int) -> None:
        held_out = workload.data().held_out(course.held_out_examples)
        if held_out is None:
            return
        inputs, targets = (each[crew.rank :: crew.world].to(crew.device) for each in held_out)
        trainer.synchronize()
        pieces = zip(inputs.split(AT_ONCE), targets.split(AT_ONCE), strict=True)
        total = sum(trainer.evaluate(*piece) * len(piece[0]) for piece in pieces)
        looks.append((step, len(inputs), total / len(inputs)))

    def train() -> dict[str, Any]:
        trainer = build()
        where = {"rank": crew.rank, "world": crew.world, "batch": course.batch, "seed": course.seed}
        for step in range(1, course.steps + 1):
            inputs, targets = workload.data().batch(step - 1, **where)
            own.append(trainer.step(inputs.to(crew.device), targets.to(crew.device)))
            if step % course.held_out_every == 0 or step == course.steps:
                look(trainer, step)
            if crew.rank == 0:
                report(step, course.steps, f"training {course.strategy}")
        account = trainer.compressor_stats()
        trainer.close()
        return account

    account, failure = crew.attempt(train)
    return {
        "plan": plan,
        "workers": crew.world,
        "about": workload.about,
        "failure": failure,
        "losses": [round(sum(step) / len(step), 6) for step in zip(*crew.gather(own), strict=False)],  # mean over ranks
        "held_out": [_together(shares) for shares in zip(*crew.gather(looks), strict=False)],  # [step, loss]
        "compressor": account or {},  # rank 0's, of the last step
    }


def _together(shares: tuple[tuple[int, int, float], ...]) -> list[float]:
    """One look, over all ranks' shares: the step and the mean loss."""
    return [shares[0][0], round(sum(count * loss for _, count, loss in shares) / sum(c for _, c, _ in shares), 6)]


def run_cell(network: Network, course: Course, report: Report) -> dict[str, Any]:
    """One pair; workers that end without a result are a result too."""
    try:
        limit = 60 + SECONDS_PER_STEP * course.steps
        return run_workers(network.lab, "benchmarks.convergence", course, report, timeout=limit)
    except WorkersFailed as error:
        return {"plan": asdict(course), "workers": network.lab.workers, "failure": str(error)}


class Shown:
    """Tells how each pair has ended, and collects them for the table."""

    def __init__(self) -> None:
        self.cells: list[dict[str, Any]] = []

    def __call__(self, cell: dict[str, Any], console: Console) -> None:
        self.cells.append(cell)
        end = cell["failure"] or (f"held-out loss {cell['held_out'][-1][1]:.4f}" if cell["held_out"] else "done")
        console.print(f"{cell['plan']['strategy']}, seed {cell['plan']['seed']}: {end}", highlight=False)


def main() -> None:
    shown = Shown()

    def given() -> tuple[argparse.Namespace, dict[str, Course]]:
        options = arguments()
        return options, courses(options)

    cells.main(cells.Benchmark("convergence", measure, run_cell, shown), given)
    losses.show(shown.cells, terminal())


if __name__ == "__main__":
    main()
