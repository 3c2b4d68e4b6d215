"""A sample of the state machine (see tests/machine): drawn programs, under plain DDP and under the library."""

import torch
from machine.compare import Rounding, compare, leaves
from machine.generate import generate
from machine.search import Search

SEEDS = range(1, 101)


def test_whatever_is_drawn_trains_as_plain_ddp_or_is_refused(pool2):
    said: list[str] = []
    found = Search(pool2, said.append)
    found.over(SEEDS, generate, shrinks=10)
    assert found.counts["equal"] > len(SEEDS) / 4, f"most of these programs show nothing: {dict(found.counts)}"
    assert not said, "\n".join(said)


def test_a_text_of_numbers_is_compared_as_these_are():
    """What rounding may change must not count as another training because it was printed, or put into a list."""

    def noted(values: torch.Tensor, told: object) -> list[tuple[int, object]]:
        return [(0, each) for each in leaves([told, values.tolist(), repr(values)])]

    want = torch.tensor([[9.3972e-05, 0.16291], [-0.31983, 1.0]])
    rounded, stale = want + 1e-7, want * 1.01
    rounding = Rounding(noted(want, 1), noted(want.double(), 1))
    assert compare(noted(rounded, 1), noted(want, 1), 1, rounding) is None
    assert compare(noted(rounded, 1), noted(want, 1), 1) is not None
    assert compare(noted(rounded, 2), noted(want, 1), 1, rounding) is not None
    for part in (slice(0, 2), slice(2, 3)):  # the list, the text
        have, others = noted(stale, 1), noted(want, 1)
        assert compare(have[part], others[part], 1, Rounding(others[part], others[part])) is not None
    assert compare([(0, "a 1.0")], [(0, "b 1.0")], 1, Rounding([(0, "b 1.0")], [(0, "b 1.0")])) is not None
