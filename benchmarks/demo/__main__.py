"""make demo: trains a GPT on the standard library's source over a slow network, by tuned DDP and by DeAR, and compares.

DDP is tuned first, over its bucket sizes. Then both train from the same weights on the same text, in rounds of a few
steps so that whatever else the machine does hits both alike; each keeps its own clock. Two pictures go to out/.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from .. import cells, progress, records
from ..command import Parser, positive, terminal
from ..launch import run_workers
from ..network.lab import open_lab
from .measure import Comparison, measure
from .show import draw, show

WORKERS = 2
RATE = "500mbit"
WORKERS_SECONDS = 1200


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    cells.network_option(parser)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    parser.add_argument("--dear", default="dear", metavar="STRATEGY", help="such as dear:replicated:1")
    parser.add_argument("--rounds", type=positive, default=8, help="of each, 6 steps long")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures and raw times go")
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), terminal()
    experiment = Comparison(given.dear, given.optimizer, given.rounds)
    console.print(
        f"Training a byte-level GPT (10.9 M parameters) on Python's standard library with {WORKERS} workers, "
        "one thread each."
    )
    with cells.ended_by_a_sentence(None), open_lab(WORKERS, None, given.network) as lab:
        console.print(lab.about)
        rate = lab.possible([RATE])[0]
        lab.set_rate(rate)
        with progress.bar(console, "demo") as report:
            result = run_workers(lab, measure, experiment, report, WORKERS_SECONDS)
    for part in ("tuning", "training"):
        result[part].update(rate=rate, network=lab.name)
    records.write(given.out / "demo.json", {**records.header("demo", asdict(experiment)), **result})
    drawn = draw(result, given.out)
    show(result, console)
    for path in drawn:
        console.print(f"Picture: {path}")
    console.print(f"Raw times: {given.out / 'demo.json'}")


if __name__ == "__main__":
    main()
