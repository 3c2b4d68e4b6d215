"""Prints the tables of raw results again: python -m benchmarks.show benchmarks/results/*.json.

Nothing is measured; every number comes from the files, whose headers say which machine, versions and commit made them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import bandwidth, demo, losses, seeds, training
from benchmarks.collectives import show as collectives_table
from benchmarks.command import Parser, fail, terminal
from benchmarks.kernels import show as kernels_table
from benchmarks.records import SourceError, load

Show = Callable[[dict[str, Any], Console], None]  # prints one file


def _each_cell(show: Show) -> Show:
    def show_all(payload: dict[str, Any], console: Console) -> None:
        for cell in payload["cells"]:
            show(cell, console)

    return show_all


def _training(payload: dict[str, Any], console: Console) -> None:
    for cell in payload["cells"]:
        training.show(cell, console, curves=[], target=None)
    seeds.show(payload["cells"], console)


def _bandwidth(payload: dict[str, Any], console: Console) -> None:
    by_workers: dict[int, list[bandwidth.Needed]] = {}
    for one in payload.get("needed", []):
        needed = {name: value for name, value in one.items() if name != "workers"}
        by_workers.setdefault(one["workers"], []).append(bandwidth.Needed(**needed))
    for workers, found in by_workers.items():
        bandwidth.show(workers, payload["settings"]["limit"], found, console)


TABLES: dict[str, Show] = {
    "training": _training,
    "collectives": _each_cell(collectives_table.show),
    "kernels": kernels_table.show,
    "convergence": lambda payload, console: losses.show(payload["cells"], console),
    "bandwidth": _bandwidth,
    "demo": demo.show,
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.show", description="Prints the tables of raw results again.")
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
