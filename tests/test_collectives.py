"""The halves of an all-reduce: exact sums at any length and dtype, failures that name who failed, misuse refused."""

import importlib
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from place import place
from torch.distributed import distributed_c10d as c10d
from workers import WorkerDied, run_workers

import dear
from dear.collectives import make_lane

LENGTHS = [0, 1, 2, 3, 7, 1000, 100_003]
TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]


def inputs_of(rank, length, dtype):
    """Small whole numbers: their sums are exact in every type."""
    return torch.randint(0, 8, (length,), generator=torch.Generator().manual_seed(rank)).to(place(), dtype)


def halves_are_exact(rank, world, algorithm):
    for dtype in TYPES:
        if algorithm == "native" and dtype == torch.int16:
            continue  # gloo has no such type
        for length in LENGTHS:
            everyone = [inputs_of(r, length, dtype) for r in range(world)]
            total = torch.stack(everyone).sum(0).to(dtype)
            begin, end = dear.shard_range(length, world, rank)
            mine = everyone[rank].clone()
            shard = dear.reduce_scatter(mine, algorithm=algorithm).wait()
            assert torch.equal(shard, total[begin:end]), (dtype, length)
            assert torch.equal(mine, everyone[rank]), "the input was changed"
            gathered = torch.full_like(total, 9)
            assert torch.equal(dear.all_gather(shard, gathered, algorithm=algorithm).wait(), total), (dtype, length)
            # In place: the output is this rank's part of the input.
            dear.reduce_scatter(mine, mine[begin:end], algorithm=algorithm).wait()
            assert torch.equal(mine[begin:end], total[begin:end]), (dtype, length)
            average = dear.all_reduce(everyone[rank].clone(), op="avg", algorithm=algorithm).wait()
            if dtype.is_floating_point:
                assert torch.equal(average, (total.double() / world).to(dtype)), (dtype, length)
            else:
                assert torch.equal(average, total.div(world, rounding_mode="trunc")), (dtype, length)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("world", [2, 4])
def test_halves_are_exact(world, algorithm, pool2, pool4):
    (pool2 if world == 2 else pool4).run(halves_are_exact, algorithm)


def test_halves_are_exact_on_three_ranks_and_on_one(pool3, pool1):
    pool3.run(halves_are_exact, "ring")
    pool1.run(halves_are_exact, "ring")


def many_at_once(rank, world):
    tensors = [torch.full((5000 + i,), float(rank + i)) for i in range(40)]
    works = [dear.all_reduce(tensor) for tensor in tensors]
    for i, work in enumerate(reversed(works)):  # waited for in another order than they were started
        want = float(sum(r + 39 - i for r in range(world)))
        assert torch.all(work.wait() == want)
        assert work.is_completed()


def test_many_at_once(pool4):
    pool4.run(many_at_once)


def large_values(rank, world):
    everyone = [torch.randn(300_000, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        exact = torch.stack([tensor.to(dtype) for tensor in everyone]).double().sum(0)
        have = dear.all_reduce(everyone[rank].to(dtype, copy=True)).wait().double()
        assert (have - exact).abs().max() <= tolerance * exact.abs().max(), dtype
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, 3e38])
    have = dear.all_reduce(special.clone()).wait()
    assert torch.equal(have.isnan(), special.isnan()) and torch.isinf(have[:2]).all() and torch.isinf(have[4])
    half = dear.all_reduce(torch.full((100,), float("nan"), dtype=torch.bfloat16)).wait()
    assert half.isnan().all(), "rounding must not turn NaN into a number"


def test_rounding_and_special_values(pool4):
    pool4.run(large_values)


LARGE = {torch.float16: 40_000.0, torch.bfloat16: 3e38, torch.float32: 3e38, torch.float64: 1.5e308}


def averages_do_not_overflow(rank, world, algorithm, dtypes):
    """DDP divides before it sums: what has an average has one here. Whole numbers keep an exact one."""
    for dtype in dtypes:
        large = torch.full((70_000,), LARGE[dtype], dtype=dtype)
        large[::2] *= -1
        mixed = large.clone() if rank % 2 else -large
        want = mixed.double() * 0 + sum(large.double() if r % 2 else -large.double() for r in range(world)) / world
        for tensor, average in ((large.clone(), large.double()), (mixed, want)):
            have = dear.all_reduce(tensor, op="avg", algorithm=algorithm).wait().double()
            assert torch.allclose(have, average, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3), (dtype, have[:4])
        small = dear.all_reduce(torch.full((9,), float(rank), dtype=dtype), op="avg", algorithm=algorithm).wait()
        assert torch.equal(small, torch.tensor((world - 1) / 2, dtype=dtype).expand(9)), (dtype, small)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_averages_do_not_overflow(world, pool2, pool3, pool4):
    {2: pool2, 3: pool3, 4: pool4}[world].run(averages_do_not_overflow, "ring", list(LARGE))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_native_averages_do_not_overflow(world, pool2, pool3, pool4):
    {2: pool2, 3: pool3, 4: pool4}[world].run(averages_do_not_overflow, "native", list(LARGE))


def native_averages_have_the_bits_of_ddp(rank, world):
    """DDP halves, and then sums."""
    for dtype in LARGE:
        both = [torch.randn(1001, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(2)]
        for tensor in both:
            tensor[:300] *= torch.finfo(dtype).tiny  # halves are subnormal, and lose a bit
        have = dear.all_reduce(both[rank].clone(), op="avg", algorithm="native").wait()
        assert torch.equal(have, both[0] / 2 + both[1] / 2), dtype


def test_native_averages_have_the_bits_of_ddp(pool2):
    pool2.run(native_averages_have_the_bits_of_ddp)


def part_of_the_world(rank, world):
    members = [1, 3]
    group = dist.new_group(members)
    if rank in members:
        tensor = torch.full((10,), float(rank))
        assert torch.all(dear.all_reduce(tensor, group=group).wait() == 4.0)
    else:
        with pytest.raises(ValueError, match="not a member"):
            dear.all_reduce(torch.zeros(3), group=group)


def test_part_of_the_world(pool4):
    pool4.run(part_of_the_world)


def lanes_of_groups_of_another_backend(rank, world):
    """A lane is of its group's backend, whichever the default group's is: NCCL's, where DDP was given such a group."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # torch then knows a backend "fake"
    for backend in ("fake", "gloo", "cpu:gloo,cuda:gloo"):
        group = dist.new_group(backend=backend)
        before = set(c10d._world.pg_map)
        lane = make_lane(group, "a test", "native", timedelta(seconds=10))
        (own,) = set(c10d._world.pg_map) - before
        assert dist.get_backend_config(own) == dist.get_backend_config(group)
        del lane


def test_lanes_of_groups_of_another_backend(pool2):
    pool2.run(lanes_of_groups_of_another_backend)


def misuse(rank, world):
    x = torch.zeros(10)
    for call, message in [
        (lambda: dear.reduce_scatter(x, op="max"), 'op must be "sum" or "avg"'),
        (lambda: dear.reduce_scatter(x, algorithm="tree"), 'algorithm must be "ring"'),
        (lambda: dear.reduce_scatter(x, torch.zeros(3)), "must have 5 elements, not 3"),
        (lambda: dear.reduce_scatter(x.to(torch.complex64)), "must not be complex"),
        (lambda: dear.reduce_scatter(torch.zeros(4, 4).t()), "must be contiguous"),
        (lambda: dear.reduce_scatter(torch.zeros(4).to_sparse()), "must be dense"),
        (lambda: dear.all_gather(torch.zeros(4), x), "must be 5 elements"),
        (lambda: dear.all_gather(torch.zeros(5, dtype=torch.float64), x), "must be 5 elements"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="cannot sum tensors of dtype Bool"):
        dear.reduce_scatter(torch.zeros(4, dtype=torch.bool))


def test_misuse_is_one_sentence(pool2):
    pool2.run(misuse)


def one_is_missing(rank, world, how, where):
    x = torch.ones(2_000_000)
    dear.all_reduce(x).wait()
    if rank == where:
        if how == "dies":
            os._exit(7)
        time.sleep(1000)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        dear.all_reduce(x).wait()
    assert time.monotonic() - start < 50
    with pytest.raises(RuntimeError):  # and so does everything after it, at once
        dear.all_reduce(x).wait()
    return str(caught.value)


@pytest.mark.parametrize("how", ["dies", pytest.param("stalls", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("world", "where"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_every_survivor_names_the_missing_rank(world, where, how):
    outcomes = run_workers(one_is_missing, world, how, where, group_timeout=10, expect_dead={where})
    assert isinstance(outcomes[where], WorkerDied)
    for rank, outcome in enumerate(outcomes):
        if rank != where:
            assert isinstance(outcome, str), outcome
            assert f"Rank {where} " in outcome and "reduce-scatter" in outcome, outcome


def other_sizes(rank, world):
    with pytest.raises(RuntimeError, match=r"another collective|closed its connection"):
        dear.all_reduce(torch.ones(10 if rank else 100_000)).wait()


def test_other_sizes_are_noticed_at_once(pool2):
    pool2.run(other_sizes, group_timeout=100)
