"""Loss by step, without timing: python -m benchmarks.convergence. What a compressor costs in training progress.

One strategy and seed after the other, each with a fresh model in fresh workers, on loopback unless told otherwise: how
fast they ran means nothing. With --json every finished pair is stored at once, and --resume goes on with the rest.
"""

import argparse

from .. import cells
from ..command import Parser, filled, listed, number, positive, terminal
from ..network.rates import UNLIMITED
from ..training.plan import training_options
from ..training.trainer import OPTIMIZERS
from ..training.workloads import WORKLOADS
from .measure import Course, measure, run_cell
from .show import show, show_pair

STRATEGIES = "ddp,acp:8,power:8,topk:0.01,sign"


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    training_options(parser, strategies=STRATEGIES, optimizer="adamw", steps=300)
    parser.add_argument("--seeds", type=listed(positive), default=[1, 2, 3], help="such as 1,2,3")
    parser.add_argument("--lr", type=number, help="learning rate, the same for every strategy")
    parser.add_argument("--held-out-every", type=positive, default=50, metavar="STEPS")
    parser.add_argument("--held-out-examples", type=positive, default=128, metavar="COUNT")
    parser.set_defaults(network="loopback", rates=[UNLIMITED])
    return parser.parse_args()


def courses(given: argparse.Namespace) -> dict[str, Course]:
    """One for each pair, by name: all strategies can be compared before the second seed is begun."""
    batch = given.batch or WORKLOADS[given.workload].batch
    rate = OPTIMIZERS[given.optimizer][1] if given.lr is None else given.lr
    return {
        f"{name} seed {seed}": filled(Course, given, strategy=name, seed=seed, batch=batch, learning_rate=rate)
        for seed in given.seeds
        for name in given.strategies
    }


def main() -> None:
    given = arguments()
    benchmark = cells.Benchmark("convergence", measure, run_cell, show_pair)
    show(cells.main(benchmark, given, courses(given)), terminal())


if __name__ == "__main__":
    main()
