"""Loss by step, without timing: python -m benchmarks.convergence. What a compressor costs in training progress.

One strategy and seed after the other, each with a fresh model in fresh workers, on loopback unless told otherwise: how
fast they ran means nothing. With --json every finished pair is stored at once, and --resume goes on with the rest.

Compressed gradients want other learning rates than dense ones. With several, --lr 1e-3,2e-3,4e-3, and optimizers,
--optimizers sgd,adamw, each method is shown at its own best one, with the bytes and, for --compute-ms and --at, the
predicted seconds until it is as low as dense.
"""

import argparse

from .. import cells
from ..command import Parser, filled, listed, number, one_of, positive, rate, terminal
from ..network.rates import UNLIMITED
from ..training.experiment import training_options
from ..training.trainer import OPTIMIZERS
from ..training.workloads import WORKLOADS
from . import best
from .measure import Course, measure, run_cell
from .schedules import SCHEDULES
from .show import show, show_pair

STRATEGIES = "ddp,acp:8,power:8,topk:0.01,sign"


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    training_options(parser, strategies=STRATEGIES, optimizer="adamw", steps=300)
    parser.add_argument("--seeds", type=listed(positive), default=[1, 2, 3], help="such as 1,2,3")
    parser.add_argument(
        "--lr", type=listed(number), help="learning rates, such as 1e-3,2e-3; each method's best counts"
    )
    parser.add_argument(
        "--optimizers", type=listed(one_of(OPTIMIZERS)), help="several, such as sgd,adamw, in place of one"
    )
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="constant", help="of the learning rate; cosine begins with a warm-up"
    )
    parser.add_argument(
        "--mean-over", type=positive, default=1, metavar="STEPS", help="of training losses, store means over so many"
    )
    parser.add_argument("--compute-ms", type=number, help="what a step computes, to predict times")
    parser.add_argument(
        "--at", type=listed(rate), default=["100mbit", "500mbit", "1gbit"], help="link rates to predict"
    )
    parser.add_argument("--held-out-every", type=positive, default=50, metavar="STEPS")
    parser.add_argument("--held-out-examples", type=positive, default=128, metavar="COUNT")
    parser.set_defaults(network="loopback", rates=[UNLIMITED])
    return parser.parse_args()


def courses(given: argparse.Namespace) -> dict[str, Course]:
    """One for each seed, optimizer, learning rate and strategy, by name: all strategies can be compared before the
    second seed is begun."""
    batch = given.batch or WORKLOADS[given.workload].batch
    chosen = given.optimizers or [given.optimizer]
    found = {}
    for seed in given.seeds:
        for kind in chosen:
            for learning_rate in given.lr or [OPTIMIZERS[kind][1]]:
                about = (f" {kind}" if given.optimizers else "") + (f" lr {learning_rate:g}" if given.lr else "")
                for name in given.strategies:
                    found[f"{name}{about} seed {seed}"] = filled(
                        Course, given, strategy=name, seed=seed, batch=batch, optimizer=kind,
                        learning_rate=learning_rate,
                    )  # fmt: skip
    return found


def main() -> None:
    given = arguments()
    benchmark = cells.Benchmark("convergence", measure, run_cell, show_pair)
    measured = cells.main(benchmark, given, courses(given))
    if given.optimizers or given.lr:
        compute = None if given.compute_ms is None else given.compute_ms / 1e3
        best.show(measured, compute, given.at, terminal())
    else:
        show(measured, terminal())


if __name__ == "__main__":
    main()
