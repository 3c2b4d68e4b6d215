"""A sample of chaos (see tests/chaos): ten jobs that are killed, stopped, paused or cut off, and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNS = 10


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What ten runs showed. A process of its own: it forks its workers, and must not have started a thread."""
    out = tmp_path_factory.mktemp("chaos") / "figures.json"
    paths = [str(ROOT), *(path for path in sys.path if path)]
    subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--runs", str(RUNS), "--seed", "1001", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    return json.loads(out.read_text())


def texts(figures):
    """What went wrong, to be read where a test fails."""
    return "\n".join(f"{run['scenario']}: {run['texts']}" for run in figures["runs"] if run["texts"])


@pytest.mark.timeout(900)
def test_nobody_hangs_or_crashes(figures):
    assert figures["all"]["runs"] == RUNS and figures["all"]["disturbed"] >= RUNS // 2
    assert figures["all"]["hung"] == figures["all"]["crashed"] == 0, texts(figures)


@pytest.mark.timeout(900)
def test_everyone_names_the_culprit(figures):
    assert figures["all"]["named rightly"] == figures["all"]["disturbed"], texts(figures)


@pytest.mark.timeout(900)
def test_what_resumes_ends_with_the_same_bits(figures):
    assert figures["all"]["resumed bit-equal"] == figures["all"]["disturbed"], texts(figures)
