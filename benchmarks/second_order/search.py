"""Learning rates, by the loss of each step: python -m benchmarks.second_order.search.

Every method trains as often, at its default rate times each number of one small grid, damping and the rest being the
defaults. Nothing is timed, so a busy machine does no harm; `python -m benchmarks.second_order --tuned FILE` then times
each method at its best rate.
"""

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from .. import cells
from ..command import Parser, filled, listed, number, one_of, positive
from ..network.rates import UNLIMITED
from ..progress import Report
from ..stats import SMOOTHED_OVER
from ..tables import alarm, note, table, value
from ..training.experiment import Experiment
from ..training.measure import TRIAL_STEPS, Candidate, Measurement, run_cell
from ..worker import Worker
from .autoencoder import KNOWN
from .methods import METHODS, parse_method
from .tuned import best

GRID = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Search(worker, Experiment(**experiment), report).run()


class Search(Measurement):
    """One cell: every method at every rate, one after another, for its losses alone."""

    def __init__(self, worker: Worker, experiment: Experiment, report: Report) -> None:
        own = Experiment([], workload="digits", optimizer="momentum", seed=experiment.seed, batch=experiment.batch)
        super().__init__(worker, own, report)
        self.experiment, self.workload = experiment, KNOWN[experiment.workload]
        self.candidates = [Candidate(parse_method(name)) for name in experiment.strategies]
        self.total = len(self.candidates) * (TRIAL_STEPS + experiment.steps)

    def run(self) -> dict[str, Any]:
        for candidate in self.candidates:
            self._one("building", self._build, candidate, TRIAL_STEPS)
            self._one("training", self._train, candidate, self.experiment.steps)
            self._one("evaluating", self._evaluate, candidate, 0)
            self._one("closing", self._close, candidate, 0)
        cell = self.finish()
        kept = ("name", "failure", "losses", "held_out_loss")
        strategies = [{name: one[name] for name in kept} for one in cell["strategies"]]
        return cell | {"plan": asdict(self.experiment), "strategies": strategies}

    def _train(self, candidate: Candidate) -> None:
        trainer = candidate.running
        if trainer is None:
            return

        def train() -> None:
            for _ in range(self.experiment.steps):
                self.step(candidate, trainer)

        _, candidate.failure = self.worker.attempt(train)

    def _close(self, candidate: Candidate) -> None:
        trainer = candidate.running
        if trainer is not None:
            _, candidate.failure = self.worker.attempt(trainer.close)
            candidate.trainer = None


def show(cell: dict[str, Any], console: Console) -> None:
    """A row for each method, then how to read it."""
    experiment, found = cell["plan"], best(cell)
    rates = len(next(iter(found.values())).others)
    columns = ["best rate", "steps to\nSGD's loss", "held-out\nloss", *(f"{index + 1}" for index in range(rates))]
    title = f"{experiment['workload']}: {cell['workers']} workers · batch {experiment['batch']} each"
    made = table(title, "method", columns)
    for method, own in found.items():
        chosen = own.chosen
        made.add_row(
            method,
            f"{chosen.learning_rate:g}{' *' if own.at_an_end else ''}",
            "never" if chosen.steps is None else str(chosen.steps),
            value(chosen.held_out, ".4f"),
            *(f"{one.lowest:.4g}" for one in own.others),
        )
    console.print(made)
    for own in found.values():
        for one in own.others:
            if one.failure:
                alarm(console, f"{one.method} at {one.learning_rate:g} failed: {one.failure}")
    note(
        console,
        "Best: after the fewest steps at the lowest loss that SGD with momentum reaches at any rate; * at an end of "
        f"the grid. The numbered columns: the lowest mean training loss of {SMOOTHED_OVER} steps, lowest rate first.",
    )


def arguments() -> argparse.Namespace:
    parser = Parser(f"{__package__}.search", __doc__)
    parser.add_argument(
        "--methods", type=listed(one_of(METHODS)), default=list(METHODS), help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--workloads", type=listed(one_of(KNOWN)), default=["digits", "autoencoder"])
    parser.add_argument("--grid", type=listed(number), default=GRID, help="what each default rate is multiplied by")
    parser.add_argument("--seed", type=positive, default=11, help="not one of those that are measured afterwards")
    parser.add_argument("--steps", type=positive, default=300, help="of each method at each rate")
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    cells.options(parser)
    parser.set_defaults(network="loopback", rates=[UNLIMITED])
    return parser.parse_args()


def experiments(given: argparse.Namespace) -> dict[str, Experiment]:
    """One for each workload, by name."""
    methods = [f"{name}/dear@{METHODS[name].learning_rate * times:g}" for name in given.methods for times in given.grid]
    return {
        workload: filled(
            Experiment, given, strategies=methods, optimizer="momentum", workload=workload, rounds=1,
            batch=given.batch or KNOWN[workload].batch,
        )
        for workload in given.workloads
    }  # fmt: skip


def main() -> None:
    given = arguments()
    search = cells.Benchmark("second_order.search", measure, partial(run_cell, work=measure), show)
    cells.main(search, given, experiments(given))


if __name__ == "__main__":
    main()
