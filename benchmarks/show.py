"""Prints the tables of raw results again: python -m benchmarks.show benchmarks/results/*.json.

Nothing is measured; every number comes from the files, whose headers say which machine, versions and commit made them.
"""

import json
import sys
from pathlib import Path

from benchmarks import collectives_table, summary
from benchmarks.command import Parser, fail, terminal

TABLES = {"training": summary.show, "collectives": collectives_table.show}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.show", description="Prints the tables of raw results again.")
    parser.add_argument("files", nargs="+", type=Path, help="such as benchmarks/results/*.json")
    console = terminal()
    for path in parser.parse_args(arguments).files:
        try:
            payload = json.loads(path.read_text())
            show = TABLES[payload["benchmark"]]
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{path} holds no results that have a table: pass what --json of a benchmark wrote.")
        console.rule(str(path.name))
        console.print(f"{payload['when']}, commit {payload['commit'][:12]}: {payload['command']}", highlight=False)
        for cell in payload["cells"]:
            show(cell, console)


if __name__ == "__main__":
    main(sys.argv[1:])
