"""How processes end: no thread of ours is in the interpreter's way."""

import subprocess
import sys
from pathlib import Path

from frameworks import torchrun


def test_a_lane_that_is_late_at_the_interpreters_end_aborts_nothing(tmp_path):
    """See Note [Threads at exit]: torchrun would show that rank 1 was aborted."""
    script = Path(__file__).with_name("ending_late.py")
    assert "rank 0 has ended its exchange" in torchrun(script, str(tmp_path / "ending"))


def test_training_behind_the_interpreters_end_is_told_so(tmp_path):
    script = Path(__file__).with_name("training_on_at_exit.py")
    command = [sys.executable, str(script), str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.startswith("Python is ending, and what it runs at exit has stopped the communication lanes")
