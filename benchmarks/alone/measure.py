"""Times the same steps of several strategies in one process, the only rank of its group."""

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..progress import Report
from ..training.gpt import GPT, VOCABULARY
from ..training.strategies import parse_strategy
from ..training.trainer import Trainer, optimizer_factory
from ..worker import accounted

HEAD = 64  # width of an attention head
WARM_UP = 5  # rounds; the optimizer makes its state in the first one


@dataclass(frozen=True)
class Experiment:
    """What is measured."""

    strategies: list[str]
    optimizer: str
    rounds: int
    batch: int
    length: int
    layers: int
    width: int


def measure(experiment: Experiment, report: Report) -> dict[str, Any]:
    """The one cell: milliseconds of every step by strategy, and how many functions a step calls."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainers = {name: _build(experiment, name) for name in experiment.strategies}
    inputs, targets = torch.randint(VOCABULARY, (2, experiment.batch, experiment.length))
    milliseconds: dict[str, list[float]] = {name: [] for name in trainers}
    with accounted() as account:
        for number in range(-WARM_UP, experiment.rounds):
            report(max(0, number), experiment.rounds, "taking turns")
            for name, trainer in trainers.items():
                start = time.perf_counter()
                trainer.step(inputs, targets)
                if number >= 0:
                    milliseconds[name].append((time.perf_counter() - start) * 1e3)
    found = [
        {"name": name, "ms": milliseconds[name], "calls": _calls(trainer, inputs, targets)}
        for name, trainer in trainers.items()
    ]
    for trainer in trainers.values():
        trainer.close()
    dist.destroy_process_group()
    return {"plan": asdict(experiment), "strategies": found, **account}


def _build(experiment: Experiment, name: str) -> Trainer:
    torch.manual_seed(0)
    net = GPT(experiment.layers, experiment.width, experiment.width // HEAD)
    assert dist.group.WORLD is not None
    return parse_strategy(name).build(net, optimizer_factory(experiment.optimizer), dist.group.WORLD)


def _calls(trainer: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Functions that one step calls, in Python or from it: a count that no other program disturbs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        trainer.step(inputs, targets)
    finally:
        sys.setprofile(None)
    return count
