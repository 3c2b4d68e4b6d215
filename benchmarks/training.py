"""Step time of training strategies on networks of chosen rates, interleaved in one run: python -m benchmarks.training.

Every worker holds the model of every strategy at once. Rounds go through the strategies in an order that rotates, a
few warm-up steps and a few timed ones each, so that whatever drifts on the machine drifts for all of them alike.
Started plainly it opens the emulated network and starts its workers there; under torchrun each process becomes one
worker, and what is measured is the network as it is.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results, summary
from benchmarks.command import UNLIMITED, Parser, fail, positive, terminal
from benchmarks.crew import Crew
from benchmarks.launch import Report, WorkersFailed, progress_bar, run_workers, worker
from benchmarks.network import AS_LAUNCHED, Network, NetworkError, network_options, open_network
from benchmarks.steps import Measurement, Plan
from benchmarks.strategies import FORMS, StrategyError, parse_strategies

STRATEGIES = "none,ddp:1,ddp:2,ddp:4,ddp:8,ddp:25,dear:sharded"
SECONDS_PER_STEP = 20  # far more than any step takes: a cell that needs longer is stuck


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--strategies", default=STRATEGIES, help=f"comma-separated, of: {FORMS}")
    network_options(parser)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--rounds", type=positive, default=8, help="times every strategy has its turn")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before the timed ones of a turn")
    parser.add_argument("--steps", type=positive, default=6, help="timed steps of a turn")
    parser.add_argument("--batch", type=positive, default=4, help="sequences per worker and step")
    parser.add_argument("--seed", type=positive, default=1)
    parser.add_argument("--json", type=Path, help="where the raw times go, such as benchmarks/results/training.json")
    given = parser.parse_args()
    try:
        given.strategies = [strategy.name for strategy in parse_strategies(given.strategies)]
    except StrategyError as error:
        parser.error(str(error))
    return given


def measure(crew: Crew, plan: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Measurement(crew, Plan(**plan), report).run()


def run_cell(network: Network, plan: Plan, report: Report) -> dict[str, Any]:
    """One cell; a strategy that takes its worker down is left out of a second try, and its row says why."""
    steps = len(plan.strategies) * (plan.rounds * (plan.warmup + plan.steps) + 5)
    while True:
        try:
            return run_workers(network.lab, "benchmarks.training", plan, report, timeout=60 + SECONDS_PER_STEP * steps)
        except WorkersFailed as error:
            culprit = (error.doing.split() or [""])[-1]
            if culprit not in plan.strategies or culprit in plan.excluded:
                raise
            why = f"took its worker down while {error.doing}: {error.reason}"
            plan = replace(plan, excluded={**plan.excluded, culprit: why})


def main() -> None:
    given = arguments()
    plan = Plan(
        given.strategies, given.optimizer, given.rounds, given.warmup, given.steps, given.batch, seed=given.seed
    )
    console = terminal()
    payload = results.header("training", {"workers": given.workers, "rates": given.rates})
    payload["cells"] = []

    def keep(cell: dict[str, Any], rate: str, network: str) -> None:
        """Shows and saves a cell as soon as it is there: an interrupt loses only the cell it interrupts."""
        payload["cells"].append({"rate": rate, "network": network, **cell})
        if given.json:
            results.write(given.json, payload)
        summary.show(payload["cells"][-1], console)

    if "RANK" in os.environ:
        launched_by_torchrun(plan, console, keep)
        return
    try:
        for workers in given.workers:
            with open_network(given.network, workers) as network:
                console.print(network.description)
                for rate in network.possible(given.rates):
                    network.set_rate(rate)
                    with progress_bar(console, f"{workers} workers, {rate}") as report:
                        cell = run_cell(network, plan, report)
                    keep(cell, rate, network.name)
    except (NetworkError, WorkersFailed) as error:
        fail(str(error))
    if given.json:
        console.print(f"Raw times: {given.json}")


def launched_by_torchrun(plan: Plan, console: Console, keep: Any) -> None:
    """Every process is a worker already; rank 0 also shows and saves."""
    crew = Crew()
    with progress_bar(console if crew.rank == 0 else Console(quiet=True), AS_LAUNCHED) as report:
        cell = Measurement(crew, plan, report).run()
    if crew.rank == 0:
        keep(cell, UNLIMITED, AS_LAUNCHED)
    crew.leave()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), measure)
    else:
        main()
