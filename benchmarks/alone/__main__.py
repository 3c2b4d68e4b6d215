"""What dear.attach() costs a single rank, beside plain DDP: python -m benchmarks.alone.

Strategies take turns, step by step, in one process. The defaults make a step of about 20 ms on one core.
"""

import argparse
from dataclasses import asdict
from functools import partial

from .. import cells, records
from ..command import Parser, filled, positive, terminal
from ..progress import Part
from ..store import Store
from ..training.experiment import strategy_names
from ..training.strategies import FORMS
from ..training.trainer import OPTIMIZERS
from .measure import Experiment, measure
from .show import show


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    default = "ddp,dear:sharded,dear:replicated"
    parser.add_argument(
        "--strategies", type=strategy_names, default=default, help=f"comma-separated, ddp and any of: {FORMS}"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--rounds", type=positive, default=300, help="steps of each strategy")
    parser.add_argument("--batch", type=positive, default=2, help="examples per step")
    parser.add_argument("--length", type=positive, default=64, help="of an example, in bytes, up to 128")
    parser.add_argument("--layers", type=positive, default=4, help="of the GPT")
    parser.add_argument("--width", type=positive, default=128, help="of the GPT, a multiple of 64")
    cells.file_options(parser)
    given = parser.parse_args()
    if "ddp" not in given.strategies:
        parser.error("--strategies has no ddp, which the others are compared with: name it")
    return given


def main() -> None:
    given, console = arguments(), terminal()
    experiment = filled(Experiment, given)
    with cells.ended_by_a_sentence(given.json):
        store = Store.open(records.header("alone", asdict(experiment)), given.json, given.resume)
        cell = store.obtain({}, experiment, Part(1, 1), "a single rank", partial(measure, experiment), console)
    show(cell, console)


if __name__ == "__main__":
    main()
