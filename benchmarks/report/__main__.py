"""Makes the report: python -m benchmarks.report benchmarks/results/*.json --out out/report.

Nothing is measured. From the raw results come report.md, with every table, and its pictures as PNGs.
"""

import sys
from pathlib import Path

from ..command import Parser, fail, terminal
from ..records import RESULTS, SourceError, load
from . import docs, files


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__package__, __doc__)
    parser.add_argument("files", nargs="*", type=Path, help="such as benchmarks/results/*.json")
    parser.add_argument("--docs", type=Path, help="write the results pages of this folder, and README.md beside it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of raw results that --docs shows")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder of the report and its pictures")
    given = parser.parse_args(arguments)
    if bool(given.files) == bool(given.docs):
        parser.error("give either files, for a report of their own, or --docs")
    try:
        if given.docs:
            written = docs.build(given.results, given.docs, given.docs.parent / "README.md")
        else:
            written = [files.build(load(given.files), given.out)]
    except (SourceError, docs.MarkersMissing) as error:
        fail(str(error))
    terminal().print(f"Written: {', '.join(map(str, written))}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
