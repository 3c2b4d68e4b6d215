"""Who owns what: each element once, whole parameters whole, balanced, and few enough ranges."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from dear._assignment import LARGEST_ITEM, SMALLEST_ITEM, Assignment, Unit, balanced_group_bytes

WORLDS = st.integers(1, 9)
NUMEL = st.one_of(st.integers(0, 50), st.integers(1_000, 9_000), st.sampled_from([100_000, 3_000_000]))
PARAM = st.tuples(NUMEL, st.booleans(), st.floats(0.5, 3.0), st.booleans())  # numel, whole, cost of one, new bucket


def units_of(params, itemsize=4, first=0):
    """Parameters one after another, in buckets."""
    units, bucket, at = [], first, 0
    for numel, whole, cost, opens in params:
        if opens and at:
            bucket, at = bucket + 1, 0
        units.append(Unit(bucket, at, at + numel, itemsize, cost * numel if whole else 0.0, whole))
        at += numel
    return units


def chunk_bytes(assignment, units, world):
    sizes = [0] * world
    for bucket in {unit.bucket for unit in units}:
        for rank, ranges in enumerate(assignment.ranges(bucket)):
            sizes[rank] += 4 * sum(stop - start for start, stop in ranges)
    return sizes


@examples(300)
@given(params=st.lists(PARAM, min_size=1, max_size=40), world=WORLDS)
def test_every_element_has_one_owner_and_whole_parameters_one(params, world):
    units = units_of(params)
    assignment = Assignment(world)
    assignment.add_group(units)
    for bucket in {unit.bucket for unit in units}:
        mine = [unit for unit in units if unit.bucket == bucket]
        owned = assignment.ranges(bucket)
        assert len(owned) == world
        covered = sorted(each for ranges in owned for each in ranges)
        assert all(start < stop for start, stop in covered)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(covered))
        assert sum(stop - start for start, stop in covered) == sum(unit.stop - unit.start for unit in mine)
        for unit in mine:
            if unit.whole and unit.stop > unit.start:
                assert sum(any(a <= unit.start and unit.stop <= b for a, b in ranges) for ranges in owned) == 1
    assert assignment.nbytes == chunk_bytes(assignment, units, world)


@examples(300)
@given(params=st.lists(PARAM, min_size=1, max_size=40), world=WORLDS)
def test_no_rank_has_more_than_the_rule_allows(params, world):
    """The costliest rank has at most the mean and one item more; where all can be cut, chunks differ by an element."""
    units = units_of(params)
    total, costs = sum(unit.nbytes for unit in units), [unit.cost for unit in units]
    assignment = Assignment(world)
    assignment.add_group(units)
    # An item is a parameter, or several that together are no longer than the target and one parameter.
    dearest = max(unit.cost / unit.nbytes if unit.nbytes else 0.0 for unit in units)
    target = min(max(total // (8 * world), SMALLEST_ITEM), LARGEST_ITEM)
    assert max(assignment.costs) <= sum(costs) / world + max(costs) + dearest * target + 1e-6
    if (
        total > SMALLEST_ITEM * 2
        and not any(unit.whole for unit in units)
        and len({unit.bucket for unit in units}) == 1
    ):
        assert max(assignment.nbytes) - min(assignment.nbytes) <= 4 * world


@examples(100)
@given(groups=st.lists(st.lists(PARAM, min_size=1, max_size=15), min_size=1, max_size=6), world=WORLDS)
def test_it_depends_on_nothing_but_its_input(groups, world):
    made = []
    for _ in range(2):
        assignment = Assignment(world)
        first = 0
        for params in groups:
            units = units_of(params, first=first)
            assignment.add_group(units)
            first = units[-1].bucket + 1
        made.append([assignment.ranges(bucket) for bucket in range(first)] + [assignment.costs, assignment.nbytes])
    assert made[0] == made[1]


def test_groups_even_out_over_time():
    """One matrix to a group: the ranks take them in turn."""
    assignment = Assignment(4)
    for bucket in range(8):
        assignment.add_group([Unit(bucket, 0, 100_000, 4, 100_000.0, True)])
    assert assignment.costs == [200_000.0] * 4


def test_what_may_be_cut_fills_up_what_is_uneven():
    assignment = Assignment(2)
    assignment.add_group([Unit(0, 0, 100_000, 4, 1.0, True), Unit(0, 100_000, 260_000, 4, 0.0, False)])
    assert assignment.ranges(0) == [[(0, 130_000)], [(130_000, 260_000)]]


def test_many_small_parameters_make_few_ranges():
    """5,000 parameters of three elements: no more ranges than ranks need to have their part."""
    for whole in (True, False):
        for world in (2, 4, 8):
            assignment = Assignment(world)
            assignment.add_group([Unit(0, 3 * i, 3 * i + 3, 4, 3.0, whole) for i in range(5000)])
            assert sum(len(ranges) for ranges in assignment.ranges(0)) <= max(4, world)
    # Vectors between matrices go with them.
    units, at = [], 0
    for _ in range(16):
        for numel, whole in ((65_536, True), (256, False)):
            units.append(Unit(0, at, at + numel, 4, float(numel) if whole else 0.0, whole))
            at += numel
    assignment = Assignment(4)
    assignment.add_group(units)
    assert sum(len(ranges) for ranges in assignment.ranges(0)) <= 17


def test_the_usual_size_of_a_fusion_group_balances_the_links():
    """Transformer blocks: with a sixteenth of the model a group has too few matrices for four ranks."""
    block = [(384 * 1152, True), (384 * 384, True), (384 * 1536, True), (384 * 1536, True), (3000, False)]
    units = [Unit(0, 0, n, 4, float(n) if w else 0.0, w) for _ in range(8) for n, w in block]
    total = sum(unit.nbytes for unit in units)
    sizes = [balanced_group_bytes(units, world) for world in (1, 2, 4, 8)]
    assert sizes == sorted(sizes) and sizes[0] == total // 16 and total // 16 < sizes[2] <= total // 2
    # Nothing to balance: the same as with sharded updates.
    assert balanced_group_bytes([Unit(0, 0, 10**6, 4, 0.0, False)] * 20, 4) == 80 * 10**6 // 16


@examples(200)
@given(
    params=st.lists(st.tuples(PARAM, st.integers(0, 5)), min_size=1, max_size=30),
    world=WORLDS,
    groups=st.integers(1, 3),
)
def test_a_team_has_one_owner(params, world, groups):
    """Wherever its parameters stand: side by side, apart, in other buckets, in other fusion groups."""
    units = [
        dataclasses.replace(unit, whole=True, team=team or None)
        for unit, (_, team) in zip(units_of([param for param, _ in params]), params, strict=True)
    ]
    assignment = Assignment(world)
    for group in range(groups):
        parts = [unit for unit in units if unit.bucket % groups == group]
        assignment.add_group(parts)
    owners: dict[int, set[int]] = {}
    for unit in units:
        for rank, ranges in enumerate(assignment.ranges(unit.bucket)):
            if unit.team and any(max(start, unit.start) < min(stop, unit.stop) for start, stop in ranges):
                owners.setdefault(unit.team, set()).add(rank)
    assert all(owned == {assignment.teams[team]} for team, owned in owners.items())
