"""A plugin of pytest: each test's outcome is noted as it ends, and what was noted before is not run again.

    DEAR_TEST_OUTCOMES=tests.jsonl python -m pytest -p benchmarks.gpu.outcomes tests/test_cuda.py

The file has one JSON object a line: the test, its outcome, and the first line of what went wrong.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

FILE = "DEAR_TEST_OUTCOMES"

_failures: dict[str, str] = {}
_skipped: set[str] = set()
_reports_to_another = False  # as one of several processes of pytest-xdist


def read(path: Path) -> dict[str, dict[str, str]]:
    """The outcomes noted so far, by test. A line that an interrupt cut short is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[one["test"]] = one
    return found


def summary(path: Path) -> dict[str, Any]:
    """How many passed and were skipped, and what failed, with why."""
    outcomes = read(path)
    counts = Counter(one["outcome"] for one in outcomes.values())
    failed = {test: one["why"] for test, one in outcomes.items() if one["outcome"] == "failed"}
    return {"passed": counts["passed"], "skipped": counts["skipped"], "failed": failed}


def pytest_configure(config: Any) -> None:
    global _reports_to_another
    _reports_to_another = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    before = read(Path(os.environ[FILE]))
    known = [item for item in items if item.nodeid in before]
    if known:
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logreport(report: Any) -> None:
    """Called after a test's set-up, after the test, and after its tear-down, which comes last."""
    test = report.nodeid
    if report.failed:
        _failures.setdefault(test, _reason(report))
    if report.skipped:
        _skipped.add(test)
    if report.when == "teardown" and not _reports_to_another:
        outcome = "failed" if test in _failures else "skipped" if test in _skipped else "passed"
        line = json.dumps({"test": test, "outcome": outcome, "why": _failures.get(test, "")})
        with open(os.environ[FILE], "a") as file:
            file.write(line + "\n")


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return (text.strip().splitlines() or ["no message"])[0]
