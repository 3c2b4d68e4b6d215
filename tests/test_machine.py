"""A sample of the state machine (see tests/machine): drawn programs, under plain DDP and under the library."""

from machine.generate import generate
from machine.search import Search

SEEDS = range(1, 101)


def test_whatever_is_drawn_trains_as_plain_ddp_or_is_refused(pool2):
    said: list[str] = []
    found = Search(pool2, said.append)
    found.over(SEEDS, generate, shrinks=10)
    assert found.counts["equal"] > len(SEEDS) / 4, f"most of these programs show nothing: {dict(found.counts)}"
    assert not said, "\n".join(said)
