"""Preconditioned training beside SGD, Adam and Muon, interleaved in one run: python -m benchmarks.second_order.

Each method runs on DDP and under this library's schedule. With several learning rates, --lr 0.02,0.05,0.1, every method
is tried at each and shown at its best, by the time to SGD's lowest loss.
"""

import argparse
from functools import partial

from .. import cells
from ..command import Parser, filled, listed, number, one_of, positive
from ..training.experiment import Experiment
from ..training.measure import run_cell
from ..training.strategies import StrategyError
from . import show
from .autoencoder import KNOWN
from .measure import measure
from .methods import FORMS, METHODS, parse_method

ALL = ",".join(f"{method}/{where}" for method in METHODS for where in ("ddp", "dear"))


def names(text: str) -> list[str]:
    """Methods, each at most once, which must all be known."""
    try:
        return [parse_method(name).name for name in listed(str)(text)]
    except StrategyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--methods", type=names, default=ALL, help=f"comma-separated, of the form {FORMS}")
    parser.add_argument("--workloads", type=listed(one_of(KNOWN)), default=list(KNOWN), help=f"of {', '.join(KNOWN)}")
    parser.add_argument(
        "--lr", type=listed(number), help="learning rates, such as 0.02,0.05; each method's best counts"
    )
    parser.add_argument("--seeds", type=listed(positive), default=[1], help="such as 1,2,3: all is measured with each")
    parser.add_argument("--rounds", type=positive, default=8, help="in each of which every method is timed")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before the timed ones of a round")
    parser.add_argument("--steps", type=positive, default=6, help="of each method, in each round")
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    cells.options(parser)
    return parser.parse_args()


def experiments(given: argparse.Namespace) -> dict[str, Experiment]:
    """One for each workload and seed, by name."""
    methods = given.methods if given.lr is None else [f"{name}@{lr:g}" for name in given.methods for lr in given.lr]
    return {
        f"{workload}, seed {seed}": filled(
            Experiment, given, strategies=methods, optimizer="momentum", workload=workload, seed=seed,
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
