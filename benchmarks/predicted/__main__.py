"""Predicted against measured step times, over stored results: python -m benchmarks.predicted."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..command import Parser
from ..records import RESULTS
from . import show
from .points import Point, points, summary


def main() -> None:
    parser = Parser(__package__, __doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="folder of raw results")
    parser.add_argument("--json", type=Path, help="write every point there")
    parser.add_argument("--cells", action="store_true", help="a row for each cell, too")
    given = parser.parse_args()
    found = list(points(given.results))
    if not found:
        parser.error(f"{given.results} has no result that can be predicted: name a folder of raw results")
    print(show.table(found))
    if given.cells:
        print(f"\n{show.cells(found)}")
    if given.json:
        payload = {"label": "predicted", "summary": asdict(summary(found)), "points": [_plain(each) for each in found]}
        given.json.write_text(json.dumps(payload, indent=1) + "\n")


def _plain(point: Point) -> dict[str, Any]:
    found = asdict(point)
    del found["rounds"]
    return found


if __name__ == "__main__":
    main()
