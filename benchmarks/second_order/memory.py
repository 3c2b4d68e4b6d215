"""Memory of a worker that trains with each method: python -m benchmarks.second_order.memory.

One method after the other, each in fresh workers. How busy the machine is does not matter.
"""

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import cells
from ..command import Parser, fail, filled, listed, one_of, positive, show_size, terminal
from ..launch import run_or_tell
from ..memory.measure import allocated, resident
from ..network.lab import Lab, Loopback
from ..network.rates import UNLIMITED
from ..progress import Report
from ..tables import alarm, note, table
from ..training.trainer import optimizer_factory
from ..worker import Worker, launched
from .autoencoder import KNOWN
from .methods import ALL, method_names, parse_method

TIMEOUT = 600
COLUMNS = {"held_bytes": "held", "peak_bytes": "peak"}


@dataclass(frozen=True)
class Load:
    """What one method trains."""

    method: str
    workload: str
    steps: int
    batch: int  # examples per worker and step
    backend: str = "gloo"
    device: str = "cpu"


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one method; every number is a list over the ranks."""
    load = Load(**experiment)
    group = worker.group()
    own, failure = worker.attempt(lambda: _train(load, worker, group, report))
    everyone = [one for one in worker.gather(own) if one]
    numbers = {name: [one[name] for one in everyone] for name in everyone[0]} if everyone else {}
    return {"plan": experiment, "workers": worker.world, "failure": failure, **numbers}


def _train(load: Load, worker: Worker, group: Any, report: Report) -> dict[str, int]:
    workload = KNOWN[load.workload]
    data = workload.data()
    _warm_up()
    base, given_out = resident(), allocated() or 0
    net = workload.build_seeded(1)
    trainer = parse_method(load.method).build(net, optimizer_factory("momentum"), group)
    trainer.loss = workload.loss
    for step in range(load.steps):
        trainer.step(*data.batch(step, rank=worker.rank, world=worker.world, batch=load.batch, seed=1))
        if worker.rank == 0:
            report(step + 1, load.steps, f"training {load.method}")
    trainer.synchronize()
    peak = resident("VmHWM") - base
    gc.collect()
    held = (allocated() or 0) - given_out
    trainer.close()
    return {"parameter_bytes": sum(param.nbytes for param in net.parameters()), "peak_bytes": peak, "held_bytes": held}


def _warm_up() -> None:
    """What the first step of any model loads into the process is none of the method's."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def run_cell(lab: Lab | Loopback, load: Load, report: Report) -> dict[str, Any]:
    """One method."""
    return run_or_tell(lab, measure, load, report, TIMEOUT)


def more_than_sgd(cell: dict[str, Any], others: Sequence[dict[str, Any]], column: str) -> float | None:
    """What the rank with most has beyond that of SGD, on DDP or under the schedule alike, per byte of parameters."""

    def key(one: dict[str, Any], method: str) -> list[Any]:
        return [one["plan"] | {"method": method}, *(one.get(name) for name in ("workers", "rate", "network"))]

    plain = "sgd/" + cell["plan"]["method"].partition("/")[2]
    for one in others:
        if not one["failure"] and key(one, one["plan"]["method"]) == key(cell, plain):
            return float(max(cell[column]) - max(one[column])) / cell["parameter_bytes"][0]
    return None


def show_one(cell: dict[str, Any], console: Console) -> None:
    """How one method has ended."""
    console.print(f"{cell['plan']['method']}: {cell['failure'] or show_size(max(cell['held_bytes']))}", highlight=False)


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for each workload, then why methods failed."""
    for workload in dict.fromkeys(cell["plan"]["workload"] for cell in found):
        own = [cell for cell in found if cell["plan"]["workload"] == workload]
        measured = [cell for cell in own if not cell["failure"]]
        columns = ["workers", *(each for name in COLUMNS.values() for each in (f"{name},\nmost", "mean", "beyond SGD"))]
        made = table(f"{workload}: memory of a worker", "method", columns)
        for cell in measured:
            made.add_row(cell["plan"]["method"], str(cell["workers"]), *_numbers(cell, own))
        console.print(made)
        for cell in own:
            if cell["failure"]:
                alarm(console, f"{cell['plan']['method']} failed, {cell['failure']}")
    note(
        console,
        "Above what the process took before there was a model. Held: what the C library has given out between two "
        "steps, so the model, its gradients and all state. Peak: resident, at most. Most: of the ranks. Beyond SGD: "
        "than that of SGD with momentum in the same place, in percent of the parameters' bytes.",
    )


def _numbers(cell: dict[str, Any], own: Sequence[dict[str, Any]]) -> list[str]:
    numbers = []
    for column in COLUMNS:
        beyond = more_than_sgd(cell, own, column)
        mean = statistics.mean(cell[column])
        numbers += [show_size(max(cell[column])), show_size(mean), "" if beyond is None else f"{100 * beyond:.1f}%"]
    return numbers


def arguments() -> argparse.Namespace:
    parser = Parser(f"{__package__}.memory", __doc__)
    parser.add_argument("--methods", type=method_names, default=ALL, help="comma-separated")
    parser.add_argument("--workloads", type=listed(one_of(KNOWN)), default=["gpt"], help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--steps", type=positive, default=4, help="of each method")
    parser.add_argument("--batch", type=positive, default=1, help="examples per worker and step")
    cells.options(parser)
    parser.set_defaults(network="loopback", rates=[UNLIMITED])
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if launched():
        fail("These processes would measure each method on top of the others: start no launcher.")
    loads = {
        f"{workload}, {method}": filled(Load, given, method=method, workload=workload)
        for workload in given.workloads
        for method in given.methods
    }
    show(cells.main(cells.Benchmark("second_order.memory", measure, run_cell, show_one), given, loads), terminal())


if __name__ == "__main__":
    main()
