"""Preconditioned training beside SGD, Adam and Muon, interleaved in one run: python -m benchmarks.second_order.

Each method runs on DDP and under this library's schedule. With several learning rates, --lr 0.02,0.05,0.1, every method
is tried at each and shown at its best, by the time to SGD's lowest loss.
"""

import argparse
from functools import partial
from pathlib import Path

from .. import cells
from ..command import Parser, fail, filled, listed, number, one_of, positive
from ..records import SourceError, load
from ..training.experiment import Experiment
from ..training.measure import run_cell
from . import show
from .autoencoder import KNOWN
from .measure import measure
from .methods import ALL, FORMS, method_names
from .tuned import best_rates, method_of


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--methods", type=method_names, default=ALL, help=f"comma-separated, of the form {FORMS}")
    parser.add_argument("--workloads", type=listed(one_of(KNOWN)), default=list(KNOWN), help=f"of {', '.join(KNOWN)}")
    parser.add_argument(
        "--lr", type=listed(number), help="learning rates, such as 0.02,0.05; each method's best counts"
    )
    parser.add_argument(
        "--tuned", type=listed(Path), help="JSON of benchmarks.second_order.search, one or several: the best rates"
    )
    parser.add_argument("--seeds", type=listed(positive), default=[1], help="such as 1,2,3: all is measured with each")
    parser.add_argument("--rounds", type=positive, default=8, help="in each of which every method is timed")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before the timed ones of a round")
    parser.add_argument("--steps", type=positive, default=6, help="of each method, in each round")
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    parser.add_argument("--breakdown", action="store_true", help="also how much of communication nothing hides")
    cells.options(parser)
    given = parser.parse_args()
    if given.lr and given.tuned:
        parser.error("give either --lr or --tuned")
    return given


def at_rates(given: argparse.Namespace, workload: str) -> list[str]:
    """The methods with their learning rates, where any were chosen."""
    if given.lr is not None:
        return [f"{name}@{lr:g}" for name in given.methods for lr in given.lr]
    if given.tuned is None:
        return list(given.methods)
    try:
        rates = best_rates([cell for source in load(given.tuned) for cell in source.cells], workload)
    except SourceError as error:
        fail(str(error))
    missing = [name for name in given.methods if "@" not in name and method_of(name) not in rates]
    if missing:
        fail(f"--tuned has no learning rate of {', '.join(missing)} on {workload}: search for it, or give NAME@LR.")
    return [name if "@" in name else f"{name}@{rates[method_of(name)]:g}" for name in given.methods]


def experiments(given: argparse.Namespace) -> dict[str, Experiment]:
    """One for each workload and seed, by name."""
    return {
        f"{workload}, seed {seed}": filled(
            Experiment, given, strategies=at_rates(given, workload), optimizer="momentum", workload=workload, seed=seed,
            batch=given.batch or KNOWN[workload].batch,
        )
        for workload in given.workloads
        for seed in given.seeds
    }  # fmt: skip


def main() -> None:
    given = arguments()
    cells.main(
        cells.Benchmark("second_order", measure, partial(run_cell, work=measure), show.show), given, experiments(given)
    )


if __name__ == "__main__":
    main()
