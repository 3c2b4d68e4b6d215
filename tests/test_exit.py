"""How processes end: no thread of ours is in the interpreter's way."""

from pathlib import Path

from frameworks import torchrun


def test_a_lane_that_is_late_at_the_interpreters_end_aborts_nothing(tmp_path):
    """See Note [Threads at exit]: torchrun would show that rank 1 was aborted."""
    script = Path(__file__).with_name("ending_late.py")
    assert "rank 0 has ended its exchange" in torchrun(script, str(tmp_path / "ending"))
