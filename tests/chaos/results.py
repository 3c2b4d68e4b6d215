"""What runs showed: the figures, and the file that holds them and every run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import records
from chaos.run import Report
from chaos.scenario import EVENTS, MODES


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
        "by event": {event: count([r for r in reports if r.scenario.event == event]) for event in sorted(set(EVENTS))},
        "by mode": {mode: count([r for r in reports if r.scenario.mode == mode]) for mode in MODES},
        "by phase": {
            "set-up": count([r for r in reports if r.scenario.place == "setup"]),
            "first two steps": count([r for r in reports if r.scenario.place != "setup" and r.scenario.step < 2]),
            "later": count([r for r in reports if r.scenario.place != "setup" and r.scenario.step >= 2]),
        },
        "by ranks": {str(world): count([r for r in reports if r.scenario.world == world]) for world in (2, 3, 4)},
    }


def load(path: Path) -> list[Report]:
    """The runs of an earlier call, which this one goes on from. Raises ValueError where they are of another commit."""
    if not path.exists():
        return []
    payload = json.loads(path.read_text())
    if payload["commit"] != records.commit():
        raise ValueError(f"--out {path} holds runs of another commit, {payload['commit'][:12]}: remove it first.")
    return [Report.of(record) for record in payload["runs"]]


def write(path: Path, reports: list[Report], settings: dict[str, Any]) -> None:
    """Everything, with what it was run on."""
    header = records.header("chaos", settings) | {"command": f"python -m tests.chaos {' '.join(sys.argv[1:])}"}
    runs = [report.record() for report in reports]
    seconds = round(sum(report.seconds for report in reports), 1)
    records.write(path, {**header, "seconds": seconds, **figures(reports), "runs": runs})
