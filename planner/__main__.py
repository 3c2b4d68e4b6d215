"""python -m dear plan | info | probe | trace: what to take, what is here, how fast the network is, what a step does."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

COMMANDS = {
    "plan": "which way of training a model should take on a cluster, predicted",
    "info": "what this installation can do, fit for a bug report",
    "probe": "measures the network under any launcher, and writes a cluster file",
    "trace": "puts a timeline of a few steps in Chrome's and Perfetto's format",
}


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one sentence."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._negative_number_matcher = re.compile(r"^-\.?\d")  # -10Gbit is a value, and not an option

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:].rstrip(".")
        self.exit(2, f"error: {sentence} (--help lists what is accepted).\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m dear", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name, about in COMMANDS.items():
        own = commands.add_parser(name, help=about, description=about)
        if given[:1] == [name]:  # only what is asked for is imported
            command = importlib.import_module(f".commands.{name}", __package__)
            command.options(own)
            own.set_defaults(run=command.run)
    try:
        found = parser.parse_args(given)
        found.run(found)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(1, f"error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
