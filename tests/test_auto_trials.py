"""Which setting is the fastest where the load of the machine changes while settings are tried."""

from __future__ import annotations

import pytest
from auto_instruments import by_size

from planner import trials
from planner.deciding import PLAIN, Way
from planner.trials import Trial, Trials

BEGUN, OTHER, DDP = Way("sharded"), Way("replicated"), Way(PLAIN)
BEST = 4.0  # MiB
STEPS = 54


class Alone:
    """One rank, which tells and is told by itself."""

    def tell(self, value, label):
        return value

    def everyones(self, value, label):
        return [value]


class Sizes:
    """A search through a list."""

    def __init__(self, sizes):
        self.left = list(sizes)

    def ask(self):
        return self.left.pop(0) if self.left else None

    def tell(self, size, seconds): ...


class Machine:
    """Seconds of a step by what is trained with, and by the load at that step. A step in which parts are new takes
    longer."""

    def __init__(self, takes, load):
        self.takes, self.load = takes, load
        self.now, self.step, self.setting, self.fresh = 0.0, 0, (BEGUN, 2.0), 0

    def go(self, way, mib):
        if way == Way("refuses"):
            raise ValueError("It cannot serve this model.")
        if (way, mib) != self.setting:
            self.setting, self.fresh = (way, mib), trials.untimed(way)

    def run(self, course):
        """Until the course ends; returns its value."""
        while True:
            try:
                next(course)
            except StopIteration as end:
                return end.value
            self.now += self.takes(*self.setting) * self.load(self.step) * (5.0 if self.fresh > 0 else 1.0)
            self.step, self.fresh = self.step + 1, self.fresh - 1


def chosen(takes, load=lambda step: 1.0, tried=((BEGUN, 2.0), (DDP, 8.0), (OTHER, 8.0)), sizes=(BEST, 32.0, 0.5) * 9):
    """What a whole search takes, the seconds it says of each finalist, and how many steps that were."""
    machine, said = Machine(takes, load), []
    search = Trials(Alone(), lambda: machine.now, machine.go, said.append)
    for way, mib in tried:
        machine.run(search.attempt(way, mib))
    machine.run(search.refine(Sizes(sizes), STEPS - machine.step))
    found = machine.run(search.finale(search.finalists(), STEPS - machine.step))
    return trials.fastest(found), found, machine.step, said


def ways_apart(margin):
    """DeAR, sharded, is faster than plain DDP and replicated updates by that share; sizes count little."""
    size = by_size(BEST, least=1.0)
    factor = {BEGUN: 1.0, DDP: 1.0 + margin, OTHER: 1.0 + margin}
    return lambda way, mib: factor[way] * (0.9 + 0.1 * size(mib))


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
@pytest.mark.parametrize("margin", [0.05, -0.05])
def test_a_load_that_comes_in_the_middle_does_not_flip_the_choice(factor, margin):
    takes = ways_apart(margin)
    still, *_ = chosen(takes)
    for when in range(STEPS):
        best, *_ = chosen(takes, lambda step: factor if step >= when else 1.0)  # noqa: B023
        plain = takes(DDP, 8.0)
        assert takes(best.way, best.mib) <= plain * 1.01, f"slower than plain DDP by a load from step {when} on"
        assert (best.way == BEGUN) == (still.way == BEGUN), f"another way by a load from step {when} on"


@pytest.mark.parametrize("length", [3, 7])
def test_a_load_that_passes_does_not_either(length):
    takes = ways_apart(0.05)
    for when in range(STEPS):
        best, *_ = chosen(takes, lambda step: 3.0 if when <= step < when + length else 1.0)  # noqa: B023
        assert best.way == BEGUN, f"another way by a load from step {when} on"


def test_a_load_that_grows_all_the_time_does_not_either():
    for margin in (0.05, -0.05):
        best, *_ = chosen(ways_apart(margin), lambda step: 1.01**step)
        assert (best.way == BEGUN) == (margin > 0)


def test_it_ends_within_its_steps_and_tries_sizes():
    best, found, steps, _ = chosen(ways_apart(0.05))
    assert steps <= STEPS and best.mib == BEST
    assert found[0].way == BEGUN and {one.way for one in found} == {BEGUN, DDP, OTHER}
    assert [one.seconds for one in found] == pytest.approx([ways_apart(0.05)(*one.setting) for one in found])
    best, found, steps, _ = chosen(ways_apart(0.05), tried=[(BEGUN, 2.0)])
    assert steps <= STEPS and [one.way for one in found] == [BEGUN, BEGUN], "the runner-up is another size"


def test_what_was_clearly_slower_twice_leaves_its_steps_to_the_others():
    factor = {BEGUN: 1.0, DDP: 1.3, OTHER: 1.05}
    machine = Machine(lambda way, mib: factor[way], lambda step: 1.0)
    search = Trials(Alone(), lambda: machine.now, machine.go, print)
    for way in (BEGUN, DDP, OTHER):
        machine.run(search.attempt(way, 8.0))
    made, seen, go = machine.step, [], machine.go
    search._go = lambda way, mib: seen.append(way) or go(way, mib)
    found = machine.run(search.finale(search.finalists(), 60))
    assert seen[:6] == [BEGUN, OTHER, DDP, OTHER, BEGUN, BEGUN], "in the other direction each time"
    assert seen.count(DDP) == 1 and seen.count(BEGUN) == seen.count(OTHER) > 5
    assert {one.way: one.seconds for one in found} == pytest.approx(factor), "what left is told of, too"
    assert 53 <= machine.step - made <= 60, "as long as there are steps for another pass"


def test_the_last_comparison_times_no_step_in_which_parts_are_still_new():
    factor = {BEGUN: 1.0, DDP: 1.05, OTHER: 1.05}
    machine = Machine(lambda way, mib: factor[way], lambda step: 1.0)
    search, go = Trials(Alone(), lambda: machine.now, machine.go, print), machine.go
    for way in (BEGUN, DDP, OTHER):
        machine.run(search.attempt(way, 8.0))

    def longer(way, mib):
        go(way, mib)
        machine.fresh = 2 if machine.fresh > 0 else machine.fresh

    search._go = longer
    found = machine.run(search.finale(search.finalists(), 40))
    assert {one.way: one.seconds for one in found} == pytest.approx(factor)


def test_the_first_step_behind_an_exchange_of_times_is_not_timed():
    """What an engine has in flight arrives meanwhile, so that step is short."""
    arrived, timed = [], []

    class Ranks(Alone):
        def everyones(self, value, label):
            arrived.append(label)
            timed.extend(value)
            return [value]

    def takes(way, mib):
        short = bool(arrived)
        arrived.clear()
        return 0.1 if short else 1.0

    machine = Machine(takes, lambda step: 1.0)
    search = Trials(Ranks(), lambda: machine.now, machine.go, print)
    for way in (BEGUN, DDP, OTHER):
        machine.run(search.attempt(way, 8.0))
    machine.run(search.finale(search.finalists(), 40))
    assert len(timed) > 20 and timed == pytest.approx([1.0] * len(timed))


@pytest.mark.parametrize(("varies", "size"), [(0.0, 2.0), (0.01, 2.0), (0.4, 8.0)])
def test_where_steps_vary_what_is_predicted_of_sizes_counts(varies, size):
    """A size of 2 MiB is measured as a tenth faster than one of 8 MiB, of which the opposite is predicted."""
    measured, foreseen = {2.0: 1.0, 8.0: 1.1}, {2.0: 3.3, 8.0: 3.0}
    machine = Machine(lambda way, mib: measured[mib], lambda step: 1 + varies * (step % 2))
    search = Trials(Alone(), lambda: machine.now, machine.go, print, lambda way, mib: foreseen[mib])
    for way, mib in [(BEGUN, 2.0), (BEGUN, 8.0), (DDP, 8.0)]:
        machine.run(search.attempt(way, mib))
    assert [one.setting for one in search.finalists() if one.way == BEGUN] == [(BEGUN, size)]


def test_what_cannot_serve_is_no_finalist():
    tried = [(BEGUN, 2.0), (DDP, 8.0), (Way("refuses"), 8.0)]
    best, found, _, said = chosen(ways_apart(0.05), tried=tried)
    assert best.way == BEGUN and [one.way for one in found] == [BEGUN, DDP]
    assert said == ["DeAR, refuses is not tried (It cannot serve this model)."]


def test_a_clock_that_stands_is_not_believed():
    best, _, _, said = chosen(lambda way, mib: 0.0 if way == DDP else 1.0)
    assert best.way != DDP and said[0] == "plain DDP took 0.0 s a step by some rank's clock, and is not chosen."


def test_what_is_as_fast_and_loses_less_is_taken():
    lossy = Way("replicated", "power:4.5x")
    assert trials.fastest([Trial(lossy, 1.0, 0.995), Trial(BEGUN, 1.0, 1.0)]).way == BEGUN
    assert trials.fastest([Trial(lossy, 1.0, 0.98), Trial(BEGUN, 1.0, 1.0)]).way == lossy
