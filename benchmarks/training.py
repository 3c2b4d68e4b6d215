"""Step time of training strategies on networks of chosen rates, interleaved in one run: python -m benchmarks.training.

Every worker holds the model of every strategy at once. Rounds go through the strategies in an order that rotates, a
few warm-up steps and a few timed ones each, so that whatever drifts on the machine drifts for all of them alike.
Started plainly it opens the emulated network and starts its workers there; under torchrun, mpirun or srun each process
becomes one worker, and what is measured is the network as it is.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import breakdown, cells, seeds, summary, tradeoff
from benchmarks.command import Parser, positive, seed_list, terminal
from benchmarks.crew import Crew
from benchmarks.launch import Report, run_surviving, run_workers
from benchmarks.losses import read
from benchmarks.network import Network
from benchmarks.steps import Measurement, Plan
from benchmarks.strategies import FORMS, OPTIMIZERS, StrategyError, parse_strategies
from benchmarks.workloads import WORKLOADS

STRATEGIES = "none,ddp:1,ddp:2,ddp:4,ddp:8,ddp:25,dear:sharded"
SECONDS_PER_STEP = 20  # far more than any step takes: a cell that needs longer is stuck


def plan_options(parser: Parser, *, strategies: str, rounds: int, warmup: int, steps: int) -> None:
    """The options that make a Plan, with these defaults."""
    parser.add_argument("--strategies", default=strategies, help=f"comma-separated, of: {FORMS}")
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--rounds", type=positive, default=rounds, help="times every strategy has its turn")
    parser.add_argument("--warmup", type=positive, default=warmup, help="steps before the timed ones of a turn")
    parser.add_argument("--steps", type=positive, default=steps, help="timed steps of a turn")
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    cells.options(parser)


def plan_of(given: argparse.Namespace, seed: int = 1) -> Plan:
    """The plan that plan_options asked for."""
    return Plan(
        strategies=given.strategies,
        optimizer=given.optimizer,
        rounds=given.rounds,
        warmup=given.warmup,
        steps=given.steps,
        batch=given.batch or WORKLOADS[given.workload].batch,
        seed=seed,
        workload=given.workload,
        backend=given.backend,
        device=given.device,
    )


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0] if __doc__ else None)
    plan_options(parser, strategies=STRATEGIES, rounds=8, warmup=2, steps=6)
    parser.add_argument("--seeds", type=seed_list, default=[1], help="such as 1,2,3: all is measured with each")
    parser.add_argument("--breakdown", action="store_true", help="then profile a few steps of each: what took how long")
    parser.add_argument("--losses", type=Path, help="JSON of benchmarks.convergence: adds the time to a target loss")
    parser.add_argument("--target", type=float, help="that loss (default: the lowest that all strategies reach)")
    given = parser.parse_args()
    try:
        given.strategies = [strategy.name for strategy in parse_strategies(given.strategies)]
        given.curves = read(given.losses) if given.losses else []
    except (StrategyError, ValueError) as error:
        parser.error(str(error))
    return given


def measure(crew: Crew, plan: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Measurement(crew, Plan(**plan), report).run()


def run_cell(network: Network, plan: Plan, report: Report) -> dict[str, Any]:
    """One cell; a strategy that takes its worker down is left out of a second try, and its row says why."""
    steps = len(plan.strategies) * (plan.rounds * (plan.warmup + plan.steps) + 15)

    def run(plan: Plan) -> dict[str, Any]:
        return run_workers(network.lab, "benchmarks.training", plan, report, timeout=60 + SECONDS_PER_STEP * steps)

    return run_surviving(plan, plan.strategies, run)


def show(cell: dict[str, Any], console: Console, curves: list[dict[str, Any]], target: float | None) -> None:
    """Every table of one cell."""
    summary.show(cell, console)
    tradeoff.show(cell, console)
    tradeoff.show_time_to_loss(cell, curves, target, console)
    breakdown.show(cell, console)


def plans(given: argparse.Namespace) -> dict[str, Plan]:
    """One for each seed, by name; a single one needs none."""
    return {
        f"seed {seed}" if len(given.seeds) > 1 else "": replace(plan_of(given, seed), breakdown=given.breakdown)
        for seed in given.seeds
    }


def main() -> None:
    asked: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []

    def given() -> tuple[argparse.Namespace, dict[str, Plan]]:
        options = arguments()
        asked.update(curves=options.curves, target=options.target)
        return options, plans(options)

    def show_cell(cell: dict[str, Any], console: Console) -> None:
        show(cell, console, **asked)
        shown.append(cell)

    cells.main(cells.Benchmark("training", measure, run_cell, show_cell), given)
    seeds.show(shown, terminal())


if __name__ == "__main__":
    main()
