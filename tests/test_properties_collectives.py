"""Collectives of any length and type, in flight together in any order: every element is right.

Values are small integers, whose sums are exact in every type, so that each result is known beforehand.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

import dear

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.int8]
LENGTHS = st.one_of(st.integers(0, 9), st.integers(10, 3000), st.sampled_from([65_535, 65_536, 65_537, 300_001]))
CALL = st.tuples(
    st.sampled_from(["reduce_scatter", "all_gather", "all_reduce", "all_to_all"]),
    LENGTHS,
    st.sampled_from(DTYPES),
    st.sampled_from(["sum", "avg"]),
    st.booleans(),  # in place
    st.sampled_from(["ring", "native"]),
)


def values(rank, length, dtype, seed):
    """Integers of a rank, from -3 to 4, whose sum over ranks is a multiple of their number."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-3, 4, (length,), generator=generator) + rank % 2).to(dtype)


def submit(rank, world, index, call):
    """One collective under way, the result it must have, and the input it must leave alone (or None)."""
    name, length, dtype, op, in_place, algorithm = call
    if name == "all_to_all":
        length *= world
    everyone = [values(r, length, dtype, index) for r in range(world)]
    mine = everyone[rank].clone()
    begin, end = dear.shard_range(length, world, rank)
    total = torch.stack([each.to(torch.int64) for each in everyone]).sum(0)
    if op == "avg":  # in floating point exact: ranks differ by 0 or 1, and there is an even number of them
        total = total.double() / world if dtype.is_floating_point else torch.div(total, world, rounding_mode="trunc")
    total = total.to(dtype)
    if name == "reduce_scatter":
        output = mine[begin:end] if in_place else None
        work = dear.reduce_scatter(mine, output, op=op, algorithm=algorithm)
        return work, total[begin:end], None if in_place else (mine, everyone[rank])
    if name == "all_reduce":
        return dear.all_reduce(mine, op=op, algorithm=algorithm), total, None
    if name == "all_gather":
        full = torch.empty(length, dtype=dtype)
        shard = full[begin:end] if in_place else torch.empty(end - begin, dtype=dtype)
        shard.copy_(everyone[rank][begin:end])
        want = torch.empty(length, dtype=dtype)
        for other in range(world):
            low, high = dear.shard_range(length, world, other)
            want[low:high] = everyone[other][low:high]
        return dear.all_gather(shard, full, algorithm=algorithm), want, None
    chunk = length // world
    want = torch.cat([each[rank * chunk : (rank + 1) * chunk] for each in everyone])
    received = torch.empty_like(mine)
    return dear.all_to_all(mine, received, algorithm=algorithm), want, (mine, everyone[rank])


def together(rank, world, calls, order):
    """All calls are submitted, then waited for in some order."""
    flying = [submit(rank, world, index, call) for index, call in enumerate(calls)]
    for index in sorted(range(len(flying)), key=lambda i: order[i % len(order)]):
        work, want, untouched = flying[index]
        have = work.wait()
        assert work.is_completed()
        assert torch.equal(have, want), calls[index]
        if untouched:
            assert torch.equal(*untouched), f"{calls[index]} changed its input"


@pytest.mark.parametrize("world", [2, 4])
@examples(10)  # of several calls each, since every example connects the ranks anew
@given(calls=st.lists(CALL, min_size=1, max_size=16), order=st.lists(st.integers(0, 99), min_size=6, max_size=6))
def test_any_calls_in_flight_together(request, world, calls, order):
    request.getfixturevalue(f"pool{world}").run(together, calls, order)


@examples(60)
@given(st.integers(0, 10**7), st.integers(1, 64))
def test_shards_cover_every_element_once(length, world):
    ranges = [dear.shard_range(length, world, rank) for rank in range(world)]
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    largest = -(-length // world)
    assert all(0 <= end - begin <= largest for begin, end in ranges)
