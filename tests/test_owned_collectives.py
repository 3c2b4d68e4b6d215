"""Halves of an all-reduce whose chunks are given ranges: every element is right."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from place import place
from properties import examples
from workers import run_workers

from dear import _C
from dear.collectives import _lane

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([5_000, 70_001]))
PART = st.tuples(LENGTHS, st.sampled_from([torch.float32, torch.float64, torch.int32]), st.integers(0, 10**6))
EXCHANGE = st.tuples(
    st.lists(PART, min_size=1, max_size=4),
    st.sampled_from(["reduce_scatter", "all_gather"]),
    st.booleans(),  # averaged
    st.booleans(),  # some elements are nobody's
)


def ranges_of(length, world, seed, partial):
    """A cut of the buffer at random places, each piece for a random rank, or for none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(0, most, (1,), generator=generator))

    cuts = sorted({draw(length) for _ in range(draw(12))} | {0, length})
    owned = [[] for _ in range(world)]
    for start, stop in itertools.pairwise(cuts):
        if not (partial and draw(4) == 0):
            owned[draw(world)].append((start, stop))
    return owned


def values(rank, length, dtype, seed):
    """Whole numbers that differ by 0 or 1 between ranks: their averages over an even number of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-3, 4, (length,), generator=generator) * 2
    return (whole + rank % 2).to(place(), dtype)


def chunk_of(flat, ranges):
    return torch.cat([flat[:0], *(flat[start:stop] for start, stop in ranges)])


def begin(rank, world, algorithm, exchange, number):
    """One exchange under way; what to compare when it has ended, and the inputs that it must leave alone."""
    parts, phase, averaged, partial = exchange
    lane = _lane(None, place(), algorithm)
    pairs, owners, checks = [], [], []
    for length, dtype, seed in parts:
        ranges = ranges_of(length, world, seed, partial)
        everyone = [values(r, length, dtype, seed) for r in range(world)]
        mine = everyone[rank].clone()
        if phase == "reduce_scatter":
            total = torch.stack(everyone).sum(0)
            if averaged:
                total = torch.div(total, world, rounding_mode=None if dtype.is_floating_point else "trunc")
            shard = mine.new_full((sum(stop - start for start, stop in ranges[rank]),), 77)
            pairs.append((mine, shard))
            checks += [(shard, chunk_of(total.to(dtype), ranges[rank])), (mine, everyone[rank])]
        else:
            want = everyone[rank].clone()
            for other in range(world):
                for start, stop in ranges[other]:
                    want[start:stop] = everyone[other][start:stop]
            pairs.append((mine, mine[:0]))
            checks.append((mine, want))
        owners.append(_C.Ownership(length, ranges))
    reduction = _C.Reduction.average if averaged else _C.Reduction.sum
    return lane.submit(getattr(_C.Phase, phase), reduction, pairs, f"exchange {number}", owners), checks


def moved(rank, world, algorithm, exchanges):
    under_way = [begin(rank, world, algorithm, exchange, number) for number, exchange in enumerate(exchanges)]
    for work, checks in under_way:
        work.wait()
        for have, want in checks:
            assert torch.equal(have, want)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@examples(10)  # of several exchanges each, since every example connects the ranks anew
@given(exchanges=st.lists(EXCHANGE, min_size=4, max_size=12))
def test_any_owners(pool2, pool4, algorithm, exchanges):
    pool2.run(moved, algorithm, exchanges)
    pool4.run(moved, algorithm, exchanges)


def test_a_world_of_one(pool1):
    parts = [(1000, torch.float32, 5), (17, torch.float64, 6)]
    for phase in ("reduce_scatter", "all_gather"):
        pool1.run(moved, "ring", [(parts, phase, True, partial) for partial in (False, True)])


def test_even_owners_are_those_of_every_collective():
    for numel in (0, 1, 7, 1000):
        for world in (1, 2, 3, 8):
            owners = _C.Ownership.even(numel, world)
            for rank in range(world):
                start, stop = _C.shard_range(numel, world, rank)
                assert owners.ranges(rank) == ([(start, stop)] if stop > start else [])
                assert owners.size(rank) == stop - start


@pytest.mark.parametrize("ranges", [[[(0, 4)], [(3, 8)]], [[(0, 9)]], [[(2, 2)]], [[(-1, 2)]]])
def test_owners_that_cannot_be(ranges):
    with pytest.raises(RuntimeError, match="give each element one owner"):
        _C.Ownership(8, ranges)


def other_owners(rank, world):
    """Ranks that were given different owners do not mix their data."""
    lane = _lane(None, place(), "ring")
    flat = torch.zeros(100_000)
    cut = 30_000 + 1000 * rank
    owners = _C.Ownership(100_000, [[(0, cut)], [(cut, 100_000)]])
    work = lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(flat, flat[:0])], "something", [owners])
    with pytest.raises(RuntimeError, match="something"):
        work.wait()
    short = torch.zeros(99)
    with pytest.raises(RuntimeError, match="must be told of as many"):
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(short, short[:0])], "something", [owners])


def test_other_owners_are_another_exchange():
    run_workers(other_owners, 2)
