"""Prints the tables of raw results again: python -m benchmarks.show benchmarks/results/*.json.

Nothing is measured; every number comes from the files, whose headers say which machine, versions and commit made them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from .alone import show as alone
from .bandwidth import show as bandwidth
from .collectives import show as collectives_table
from .command import Parser, fail, terminal
from .convergence import show as losses
from .demo import show as demo
from .kernels import show as kernels_table
from .memory import show as memory
from .records import SourceError, load
from .second_order import memory as second_order_memory
from .second_order import search as second_order_search
from .second_order import show as second_order
from .training import seeds
from .training import show as training

Show = Callable[[dict[str, Any], Console], None]  # prints one file


def _each_cell(show: Show) -> Show:
    def show_all(payload: dict[str, Any], console: Console) -> None:
        for cell in payload["cells"]:
            show(cell, console)

    return show_all


def _training(payload: dict[str, Any], console: Console) -> None:
    for cell in payload["cells"]:
        training.show(cell, console)
    seeds.show(payload["cells"], console)


TABLES: dict[str, Show] = {
    "training": _training,
    "collectives": _each_cell(collectives_table.show),
    "kernels": kernels_table.show,
    "convergence": lambda payload, console: losses.show(payload["cells"], console),
    "alone": _each_cell(alone.show),
    "bandwidth": bandwidth.show_file,
    "memory": lambda payload, console: memory.show(payload["cells"], console),
    "demo": demo.show,
    "second_order": _each_cell(second_order.show),
    "second_order.search": _each_cell(second_order_search.show),
    "second_order.memory": lambda payload, console: second_order_memory.show(payload["cells"], console),
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(f"{__package__}.show", __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="such as benchmarks/results/*.json")
    console = terminal()
    for path in parser.parse_args(arguments).files:
        try:
            (source,) = load([path])
        except SourceError as error:
            fail(str(error))
        if source.benchmark not in TABLES:
            fail(f"{path} is of the benchmark {source.benchmark!r}, which has no table: leave it out.")
        console.rule(source.file)
        console.print(f"{source.when}, commit {source.commit}: {source.command}", highlight=False)
        TABLES[source.benchmark](source.payload, console)


if __name__ == "__main__":
    main(sys.argv[1:])
