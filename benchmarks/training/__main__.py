"""Step time of training strategies on networks of chosen rates, interleaved in one run: python -m benchmarks.training.

Every worker holds the model of every strategy at once. Rounds go through the strategies in an order that rotates, a
few warm-up steps and a few timed ones each, so that whatever drifts on the machine drifts for all of them alike.
Started plainly it opens the emulated network and starts its workers there; under torchrun, mpirun or srun each process
becomes one worker, and what is measured is the network as it is.
"""

import argparse
from pathlib import Path

from .. import cells
from ..command import Parser, listed, positive, terminal
from . import seeds
from .experiment import Experiment, experiment_of, experiment_options
from .measure import measure, run_cell
from .show import show

STRATEGIES = "none,ddp:1,ddp:2,ddp:4,ddp:8,ddp:25,dear:sharded"


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    experiment_options(parser, strategies=STRATEGIES, rounds=8, warmup=2, steps=6)
    parser.add_argument("--seeds", type=listed(positive), default=[1], help="such as 1,2,3: all is measured with each")
    parser.add_argument("--breakdown", action="store_true", help="then profile a few steps of each: what took how long")
    parser.add_argument("--traces", type=Path, help="folder for a trace of a few steps of each, by torch's profiler")
    return parser.parse_args()


def experiments(given: argparse.Namespace) -> dict[str, Experiment]:
    """One for each seed, by name; a single one needs none."""
    traces = str(given.traces or "")
    return {
        f"seed {seed}" if len(given.seeds) > 1 else "": experiment_of(given, seed=seed, traces=traces)
        for seed in given.seeds
    }


def main() -> None:
    given = arguments()
    measured = cells.main(cells.Benchmark("training", measure, run_cell, show), given, experiments(given))
    seeds.show(measured, terminal())


if __name__ == "__main__":
    main()
