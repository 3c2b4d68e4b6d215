"""``python -m tests.chaos --runs 200 --seed 1 --out out/chaos.json``"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from chaos.plan import EVENTS, MODES, draw
from chaos.run import Chaos, Report


def figures(reports: list[Report]) -> dict[str, Any]:
    """What the runs showed, in all, by event and by mode."""

    def count(some: list[Report]) -> dict[str, int]:
        tried = [report for report in some if not report.undisturbed]
        return {
            "runs": len(some),
            "came too late to matter": len(some) - len(tried),
            "named rightly": sum(report.named for report in tried),
            "hung": sum(report.hung for report in tried),
            "crashed": sum(report.crashed for report in tried),
            "resumed bit-equal": sum(bool(report.resumed) for report in tried),
            "disturbed": len(tried),
        }

    return {
        "all": count(reports),
        "by event": {event: count([r for r in reports if r.plan.event == event]) for event in sorted(set(EVENTS))},
        "by mode": {mode: count([r for r in reports if r.plan.mode == mode]) for mode in MODES},
        "by phase": {
            "set-up": count([r for r in reports if r.plan.place == "setup"]),
            "first two steps": count([r for r in reports if r.plan.place != "setup" and r.plan.step < 2]),
            "later": count([r for r in reports if r.plan.place != "setup" and r.plan.step >= 2]),
        },
        "by ranks": {str(world): count([r for r in reports if r.plan.world == world]) for world in (2, 3, 4)},
    }


def main() -> int:
    """Runs plans; the exit status says whether every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; they count on from it")
    parser.add_argument("--out", type=Path, help="a file for the figures and every run, as JSON")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    chaos, reports, start = Chaos(), [], time.monotonic()
    for seed in range(options.seed, options.seed + options.runs):
        if time.monotonic() - start > 60 * options.minutes:
            break
        report = chaos.run(draw(seed))
        reports.append(report)
        good = report.undisturbed or (report.named and not report.hung and not report.crashed and report.resumed)
        if not good:
            print(f"{report.plan}: {report.texts or 'resumed with other bits'}", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            result = {"seconds": round(time.monotonic() - start, 1), **figures(reports)}
            options.out.write_text(json.dumps({**result, "runs": [report.record() for report in reports]}, indent=1))
    result = {"seconds": round(time.monotonic() - start, 1), **figures(reports)}
    print(json.dumps(result, indent=1))
    total = Counter(result["all"])
    kept = total["disturbed"] == total["named rightly"] == total["resumed bit-equal"]
    return int(not kept or bool(total["hung"] or total["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
