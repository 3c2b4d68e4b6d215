"""``python -m tests.machine --sequences 5000 --seed 1``"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from workers import WorkerPool

from benchmarks import records
from machine.case import ALL_HOWS, Case
from machine.generate import generate
from machine.search import Search

CHUNK = 50


def main() -> int:
    """Runs sequences; the exit status says whether all were equal or clearly refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first sequence; they count on from it")
    parser.add_argument("--how", choices=ALL_HOWS, help="one way to put the library under the model (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="more than two are in nodes of two (default: 2)")
    parser.add_argument(
        "--optimizers", type=int, choices=(1, 2), help="so many in each program (default: one, and sometimes two)"
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="LABEL", help="kinds of use to leave out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    options = parser.parse_args()
    settings = {
        name: getattr(options, name) for name in ("sequences", "seed", "how", "workers", "optimizers", "without")
    }
    header = records.header("machine", settings) | {"command": f"python -m tests.machine {' '.join(sys.argv[1:])}"}

    def draw(seed: int) -> Case:
        return generate(seed, options.without, options.how, options.workers, options.optimizers)

    start, done = time.monotonic(), 0
    if options.workers < 1 or (options.workers > 2 and options.workers % 2):
        parser.error("--workers must be 1, 2 or a multiple of 2.")
    with WorkerPool(options.workers) as pool:
        search = Search(pool, lambda text: print(text, flush=True))
        while done < options.sequences and time.monotonic() - start < 60 * options.minutes:
            count = min(CHUNK, options.sequences - done)
            seeds = range(options.seed + done, options.seed + done + count)
            search.over(seeds, draw)
            done += count
            print(
                f"{done} sequences, {time.monotonic() - start:.0f} s: {dict(search.counts)}",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - start
    print(f"\n{done} sequences in {seconds:.0f} s: {dict(search.counts)}")
    for text, count in search.refusals.most_common():
        print(f"{count:5} refused: {text}")
    for cause in sorted(search.causes, key=lambda cause: -len(cause.seeds)):
        print(f"{len(cause.seeds):5} {cause.outcome.kind} [{', '.join(sorted(cause.case.labels))}] {cause.case.how}")
    if options.out:
        records.write(options.out, {**header, "seconds": round(seconds, 1), "sequences": done, **search.figures()})
    return int(bool(search.causes))


if __name__ == "__main__":
    sys.exit(main())
