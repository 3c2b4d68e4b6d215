"""``python -m tests.chaos --runs 200 --seed 1 --out out/chaos.json``"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from chaos import results
from chaos.run import Chaos
from chaos.scenario import MODES, draw


def main() -> int:
    """Runs scenarios; the exit status says whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; they count on from it")
    parser.add_argument("--mode", choices=MODES, help="the only mode (default: drawn)")
    parser.add_argument("--out", type=Path, help="a file for the figures and every run, as JSON; goes on from there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; call again to go on")
    options = parser.parse_args()
    reports = results.load(options.out) if options.out else []
    had = {report.scenario.seed for report in reports}
    chaos, start = Chaos(), time.monotonic()
    for seed in range(options.seed, options.seed + options.runs):
        if seed in had:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            break
        report = chaos.run(draw(seed, options.mode))
        reports.append(report)
        good = report.undisturbed or (report.named and not report.hung and not report.crashed and report.resumed)
        if not good:
            print(f"{report.scenario}: {report.texts or 'resumed with other bits'}", flush=True)
        if options.out:
            results.write(options.out, reports, {"runs": options.runs, "seed": options.seed, "mode": options.mode})
    figures = results.figures(reports)
    print(json.dumps(figures, indent=1))
    total = Counter(figures["all"])
    kept = total["disturbed"] == total["named rightly"] == total["resumed bit-equal"]
    return int(not kept or bool(total["hung"] or total["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
