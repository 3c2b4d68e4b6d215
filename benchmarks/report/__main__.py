"""Makes the report: python -m benchmarks.report benchmarks/results/*.json --out out/report.

Nothing is measured. From the raw results come index.html, which needs no other file, and its pictures as PNGs.
"""

import sys
from pathlib import Path

from ..command import Parser, fail, terminal
from ..records import SourceError, load
from . import docs, page
from .evidence import Evidence

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__package__, __doc__)
    parser.add_argument("files", nargs="*", type=Path, help="such as benchmarks/results/*.json")
    parser.add_argument("--docs", type=Path, help="write the results pages of this folder, and README.md beside it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of raw results that --docs shows")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder of the page and the pictures")
    given = parser.parse_args(arguments)
    if bool(given.files) == bool(given.docs):
        parser.error("give either files, for a page of their own, or --docs")
    try:
        if given.docs:
            written = docs.build(given.results, given.docs, given.docs.parent / "README.md")
            terminal().print(f"Written: {', '.join(map(str, written))}", highlight=False)
            return
        sources = load(given.files)
    except (SourceError, docs.MarkersMissing) as error:
        fail(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    parts = page.parts(Evidence.of(sources), given.out)
    where = given.out / "index.html"
    where.write_text(page.render(parts, sources))
    console = terminal()
    if empty := [name for name, found in parts.items() if not found]:
        console.print(f"Empty sections, which say how to fill them: {', '.join(empty)}.", highlight=False)
    console.print(f"Report of {len(sources)} files: {where}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
