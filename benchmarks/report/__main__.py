"""Makes the report: python -m benchmarks.report benchmarks/results/*.json --out out/report.

Nothing is measured. From the raw results come index.html, which needs no other file, and its pictures as PNGs.
"""

import sys
from pathlib import Path

from ..command import Parser, fail, terminal
from ..records import SourceError, load
from . import page, sections
from .evidence import Evidence


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__package__, __doc__)
    parser.add_argument("files", nargs="+", type=Path, help="such as benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder of the page and the pictures")
    given = parser.parse_args(arguments)
    try:
        sources = load(given.files)
    except SourceError as error:
        fail(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    built = sections.build(Evidence.of(sources), given.out)
    where = given.out / "index.html"
    where.write_text(page.render(built, sources))
    console = terminal()
    for section in built:
        if section.missing:
            console.print(f"Section '{section.title}' is empty: {section.missing.why}", highlight=False)
    console.print(f"Report of {len(sources)} files: {where}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
