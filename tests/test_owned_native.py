"""Chunks of given ranges over a backend's own collectives: padded or grouped, whichever the note [Staging] says."""

import importlib
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from place import place
from workers import run_workers

from benchmarks.training.gpt import GPT
from benchmarks.training.muon import muon_and_adamw
from dear import _C, _assignment
from dear._fusion import ddp_bucket_bytes, fuse
from dear._owned import _Requirements
from dear.collectives import make_lane

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def in_ranges(sizes, step=1):
    """Each rank's chunk in ranges of `step` equal pieces, the ranks' pieces in turn; and how long the buffer is."""
    ranges, at = [[] for _ in sizes], 0
    for _ in range(step):
        for rank, size in enumerate(sizes):
            if size // step:
                ranges[rank].append((at, at + size // step))
            at += size // step
    return ranges, at


def values(rank, length, dtype):
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)).to(place(), dtype)


def exchanged(lane, phase, reduction, parts, owners):
    work = lane.submit(getattr(_C.Phase, phase), getattr(_C.Reduction, reduction), parts, "fusion group 1", owners)
    work.wait()
    return work


def halves(rank, world, sizes):
    """Both halves, averaged: of one buffer of each type, and of all together."""
    lane = make_lane(dist.group.WORLD, "a lane", "native", timedelta(seconds=60))
    want = halved_and_summed if world == 2 else mean
    ranges, length = in_ranges(sizes, 3)
    owners, kept = [], []
    for dtype in TYPES:
        everyone = [values(r, length, dtype) for r in range(world)]
        mine, shard = everyone[rank].clone(), torch.full((sizes[rank],), 77).to(place(), dtype)
        owner = _C.Ownership(length, ranges)
        owners.append(owner)
        kept.append((mine, shard, everyone))
        for _ in range(2):  # the staging buffers of a later step hold what the one before has left
            work = exchanged(lane, "reduce_scatter", "average", [(mine, shard)], [owner])
            if place().type == "cpu":  # gloo's own reduce-scatter would send twice as much
                assert work.bytes_sent() == (length - sizes[rank]) * dtype.itemsize
    together = [(mine, torch.zeros_like(shard)) for mine, shard, _ in kept]
    exchanged(lane, "reduce_scatter", "average", together, owners)
    for (mine, shard, everyone), (_, again) in zip(kept, together, strict=True):
        result = want(everyone)
        chunk = torch.cat([result[:0], *(result[start:stop] for start, stop in ranges[rank])])
        eps = 0 if world == 2 else 4 * torch.finfo(mine.dtype).eps  # sums of several are rounded on the way
        tolerance = {"rtol": eps, "atol": eps}
        torch.testing.assert_close(shard, chunk, **tolerance)
        assert torch.equal(shard, again) and torch.equal(mine, everyone[rank]), "the input was changed"
        full = torch.zeros_like(mine)
        for start, stop in ranges[rank]:
            full[start:stop] = result[start:stop]
        exchanged(lane, "all_gather", "sum", [(full, full[:0])], [owners[0]])
        assert torch.equal(full, result)


def halved_and_summed(everyone):
    """As DDP averages: each rank divides, then they are summed."""
    total = everyone[0] / len(everyone)
    for each in everyone[1:]:
        total = total + each / len(everyone)
    return total


def mean(everyone):
    return torch.stack([each.double() for each in everyone]).mean(0).to(everyone[0].dtype)


@pytest.mark.parametrize("sizes", [[3000, 999], [0, 300], [3000, 2994]])  # the last is gathered with padding
def test_the_bits_of_ddp(pool2, sizes):
    pool2.run(halves, sizes)


@pytest.mark.parametrize("sizes", [[3000, 999, 30], [300, 0, 903], [0, 0, 300], [1200, 1200, 1194]])
def test_averages_of_three(pool3, sizes):
    pool3.run(halves, sizes)


@pytest.mark.parametrize("sizes", [[3000, 999, 0, 6], [1200, 1200, 1200, 1200]])
def test_averages_of_four(pool4, sizes):
    pool4.run(halves, sizes)


# --------------------------------------------------------------------------------------------------- what is moved


class Pretended:
    """The lane of one of `world` ranks, whose backend moves nothing."""

    def __init__(self, rank, world):
        fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
        dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=world)
        self.lane, self.rank = _C.NativeLane(dist.group.WORLD), rank

    def sent(self, owners):
        """Bytes of each half of a fusion group with these buckets."""
        full = [torch.arange(owner.numel, dtype=torch.float32) for owner in owners]
        pairs = [(each, torch.zeros(owner.size(self.rank))) for each, owner in zip(full, owners, strict=True)]
        works = [exchanged(self.lane, phase, "sum", pairs, owners) for phase in ("reduce_scatter", "all_gather")]
        for (each, shard), owner in zip(pairs, owners, strict=True):
            own = [each[start:stop] for start, stop in owner.ranges(self.rank)]
            assert torch.equal(shard, torch.cat([shard[:0], *own])), "the others gave nothing"
        return [work.bytes_sent() for work in works]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        dist.destroy_process_group()


def which_way(rank, world):
    sizes = {1020: [1020, 1000, 1000], 1100: [1100, 1000, 900], 2000: [2000, 0, 1000]}
    for longest, chunks in sizes.items():
        ranges, length = in_ranges(chunks)
        for one in range(3):
            with Pretended(one, 3) as pretended:
                sent = pretended.sent([_C.Ownership(length, ranges)])
            padded = [4 * 2 * longest] * 2
            grouped = [4 * (length - chunks[one]), 4 * (length - chunks[(one + 1) % 3])]
            assert sent == (padded if longest == 1020 else grouped), (longest, one)


def test_padding_is_two_per_cent_at_most(pool1):
    pool1.run(which_way, backend=None)


def gpt_with_muon(world):
    """The fusion groups of the benchmark's GPT: of each its buckets' owners."""
    net = GPT()
    requirements = _Requirements(muon_and_adamw(net, 0.02).optimizers, [])
    units = [requirements.unit(param, 0, 0) for param in reversed(list(net.parameters()))]
    size = _assignment.balanced_group_bytes(units, world)
    buckets = _assignment._bucketed(units, ddp_bucket_bytes(size))
    assignment, groups, first = _assignment.Assignment(world), [], 0
    for number in fuse([sum(unit.nbytes for unit in bucket) for bucket in buckets], size):
        group = buckets[first : first + number]
        assignment.add_group([unit for bucket in group for unit in bucket])
        groups.append([_C.Ownership(bucket[-1].stop, assignment.ranges(bucket[0].bucket)) for bucket in group])
        first += number
    return groups


def bytes_of_a_step(rank, world, of):
    groups = gpt_with_muon(of)
    chunks = [[sum(owner.size(r) for owner in owners) for r in range(of)] for owners in groups]
    model = 4 * sum(map(sum, chunks))
    all_reduce = 2 * (of - 1) * model / of  # of each rank, by a ring
    padded = sum(2 * (of - 1) * 4 * max(sizes) for sizes in chunks) / all_reduce
    sent = []
    for one in range(of):
        with Pretended(one, of) as pretended:
            sent.append(sum(sum(pretended.sent(owners)) for owners in groups) / all_reduce)
    return padded, sum(sent) / of, max(sent)


@pytest.mark.parametrize("world", [4, 8])
def test_bytes_of_a_gpt_with_muon(pool1, world):
    """Those of an all-reduce and less than 2%; the busiest rank's follow from how fusion groups are sized. All padded
    would be 11% and 52% more."""
    [(padded, sent, busiest)] = pool1.run(bytes_of_a_step, world, backend=None)
    assert padded == pytest.approx({4: 1.109, 8: 1.519}[world], abs=0.01)
    assert 0.999 < sent < 1.02
    assert busiest < _assignment.BALANCED


# -------------------------------------------------------------------------------------------------------- failures


def one_is_gone(rank, world, phase):
    lane = make_lane(dist.group.WORLD, "a lane", "native", timedelta(seconds=60))
    full = torch.ones(1000)
    owners = _C.Ownership(1000, [[(0, 900)], [(900, 1000)], []])
    parts = [(full, torch.zeros(owners.size(rank)))]
    exchanged(lane, phase, "average", parts, [owners])
    if rank == 1:
        os._exit(3)
    with pytest.raises(RuntimeError, match=rf"The {phase.replace('_', '-')} of fusion group 1 failed on rank {rank}: "):
        for _ in range(1000):  # a broadcast's source may end before the others notice
            exchanged(lane, phase, "average", parts, [owners])
            time.sleep(0.01)


@pytest.mark.parametrize("phase", ["reduce_scatter", "all_gather"])
def test_a_failure_is_named(phase):
    run_workers(one_is_gone, 3, phase, expect_dead={1}, group_timeout=20)
