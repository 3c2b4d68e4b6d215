"""Memory of a worker, in bytes per byte of parameters: python -m benchmarks.memory.

One strategy after the other, each in fresh workers, since a process does not give back all that it has freed. How busy
the machine is does not matter. With --json every finished strategy is stored at once, and --resume goes on with the
rest.
"""

import argparse

from .. import cells
from ..command import Parser, fail, filled, positive, terminal
from ..network.rates import UNLIMITED
from ..training.experiment import strategy_names
from ..training.strategies import FORMS
from ..training.trainer import OPTIMIZERS
from ..worker import launched
from .measure import Load, measure, run_cell
from .show import show, show_one

STRATEGIES = (
    "ddp,dear:sharded,dear:replicated,dear+topk:0.01,dear+sign,dear+acp:4,dear+power:4,dear+bf16,topk:0.01,sign,acp:4,"
    "power:4,bf16"
)


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--strategies", type=strategy_names, default=STRATEGIES, help=f"comma-separated, of: {FORMS}")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--steps", type=positive, default=4, help="the last of which is looked at")
    parser.add_argument("--batch", type=positive, default=1, help="examples per worker and step")
    parser.add_argument("--length", type=positive, default=16, help="of an example, in bytes, up to 128")
    parser.add_argument("--layers", type=positive, default=8, help="of the GPT")
    parser.add_argument("--width", type=positive, default=640, help="of the GPT, a multiple of 64")
    cells.options(parser)
    parser.set_defaults(network="loopback", rates=[UNLIMITED])
    return parser.parse_args()


def loads(given: argparse.Namespace) -> dict[str, Load]:
    """One for each strategy, by name; DDP also as torch builds it where nothing is said."""
    found = {}
    for name in given.strategies:
        found[name] = filled(Load, given, strategy=name)
        if name == "ddp":
            found["ddp, copies"] = filled(Load, given, strategy=name, views=False)
    return found


def main() -> None:
    given = arguments()
    if launched() and len(given.strategies) > 1:
        fail("These processes would measure each strategy on top of the others: name one, or start no launcher.")
    benchmark = cells.Benchmark("memory", measure, run_cell, show_one)
    show(cells.main(benchmark, given, loads(given)), terminal())


if __name__ == "__main__":
    main()
