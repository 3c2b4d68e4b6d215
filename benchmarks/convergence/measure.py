"""Inside a worker: trains one strategy with one seed, and looks at the held-out loss now and then."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..launch import run_or_tell
from ..network.lab import Lab, Loopback
from ..progress import Report
from ..training.strategies import parse_strategy
from ..training.trainer import Trainer, optimizer_factory
from ..training.workloads import WORKLOADS
from ..worker import Worker
from .schedules import schedulers

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
    schedule: str = "constant"  # of the learning rate: one of schedules.SCHEDULES
    mean_over: int = 1  # steps: of training losses the mean over so many is stored
    backend: str = "gloo"
    device: str = "cpu"


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one pair: trains, and returns what rank 0 keeps."""
    course = Course(**experiment)
    workload, group = WORKLOADS[course.workload], worker.group()
    own: list[float] = []
    looks: list[tuple[int, int, float]] = []  # steps done, examples of this rank's share, their mean loss
    right: list[tuple[int, int, float]] = []  # after the last step, the share of them that is right

    def build() -> Trainer:
        net = workload.build_seeded(course.seed).to(worker.device)
        trainer = parse_strategy(course.strategy).build(
            net, optimizer_factory(course.optimizer, course.learning_rate), group
        )
        trainer.loss = workload.loss
        return trainer

    def look(trainer: Trainer, step: int) -> None:
        held_out = workload.data().held_out(course.held_out_examples)
        if held_out is None:
            return
        inputs, targets = (each[worker.rank :: worker.world].to(worker.device) for each in held_out)
        trainer.synchronize()
        pieces = list(zip(inputs.split(AT_ONCE), targets.split(AT_ONCE), strict=True))

        def mean(measured: Callable[[Tensor, Tensor], float]) -> float:
            return sum(measured(*piece) * len(piece[0]) for piece in pieces) / len(inputs)

        looks.append((step, len(inputs), mean(trainer.evaluate)))
        if step == course.steps:
            right.append((step, len(inputs), mean(trainer.accuracy)))

    def train() -> dict[str, Any]:
        trainer = build()
        rates = schedulers(course.schedule, trainer.optimizer, course.steps)
        where = {"rank": worker.rank, "world": worker.world, "batch": course.batch, "seed": course.seed}
        for step in range(1, course.steps + 1):
            inputs, targets = workload.data().batch(step - 1, **where)
            own.append(trainer.step(inputs.to(worker.device), targets.to(worker.device)))
            for rate in rates:
                rate.step()
            if step % course.held_out_every == 0 or step == course.steps:
                look(trainer, step)
            if worker.rank == 0:
                report(step, course.steps, f"training {course.strategy}")
        strategy = parse_strategy(course.strategy)
        account = {"bytes_sent": strategy.payload_bytes(trainer.net, worker.world), **trainer.compressor_stats()}
        trainer.close()
        return account

    account, failure = worker.attempt(train)
    return {
        "plan": experiment,
        "workers": worker.world,
        "about": workload.about,
        "failure": failure,
        "losses": _means(worker.gather(own), course.mean_over),
        "held_out": [_together(shares) for shares in zip(*worker.gather(looks), strict=False)],  # [step, loss]
        "accuracy": [_together(shares) for shares in zip(*worker.gather(right), strict=False)],  # [step, share]
        "bytes_per_step": (account or {}).get("bytes_sent", 0),  # of the last step, by rank 0
        "compressor": account or {},  # rank 0's, of the last step
    }


def _means(of_ranks: list[list[float]], over: int) -> list[float]:
    """Training losses: the mean over the ranks, and over so many steps."""
    steps = [statistics.fmean(step) for step in zip(*of_ranks, strict=False)]
    return [round(statistics.fmean(steps[first : first + over]), 6) for first in range(0, len(steps), over)]


def _together(shares: tuple[tuple[int, int, float], ...]) -> list[float]:
    """One look, over all ranks' shares: the step and the mean."""
    return [shares[0][0], round(sum(count * each for _, count, each in shares) / sum(c for _, c, _ in shares), 6)]


def run_cell(lab: Lab | Loopback, course: Course, report: Report) -> dict[str, Any]:
    """One pair."""
    return run_or_tell(lab, measure, course, report, 60 + SECONDS_PER_STEP * course.steps)
