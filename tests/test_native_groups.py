"""Lanes of a backend's own collectives among ranks that are in different numbers of process groups."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import training
from torch.distributed import distributed_c10d as c10d
from training import SMALL

import compress
import precondition
from dear.collectives import make_lane

NATIVE = {**SMALL, "algorithm": "native"}


def alone(ranks):
    """A group that the other ranks do not hear of; what torch has made on this rank is then not what it has on them."""
    return [dist.new_group(list(ranks), use_local_synchronization=True)] if dist.get_rank() in ranks else []


def trains_alike(rank, world, update):
    """Rank 0 has a group to itself, and ranks 1 and 2, which train with others, have one together."""
    mine = [dist.new_group([0, 1]), dist.new_group([3, 2])][rank // 2]
    others = [*alone([0]), *alone([1, 2])]
    for _ in range(2):  # attached again, lanes are others
        training.compare(rank, world, "Mlp", ddp={"process_group": mine}, attach={**NATIVE, "update": update})
        others += alone([3])
    in_two_levels = {**NATIVE, "update": update, "hierarchy": 2}
    training.compare(rank, world, "Mlp", attach=in_two_levels, exact=False)


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_ranks_may_be_in_different_numbers_of_groups(pool4, update):
    pool4.run(trains_alike, update)


def compresses_and_preconditions(rank, world):
    others = alone([0])
    for options in (
        {"compressor": compress.TopK(density=0.1)},
        {"compressor": compress.PowerSGD(rank=2), "hierarchy": 2},
        {"preconditioner": precondition.KFAC()},
    ):
        training.train(rank, "Mlp", attach={**NATIVE, **options})
    assert len(others) == (rank == 0)


def test_lanes_of_compressors_and_preconditioners(pool4):
    pool4.run(compresses_and_preconditions)


def made(group, *arguments, **options):
    """A lane, and the group that it has."""
    before = set(c10d._world.pg_map)
    lane = make_lane(group, "a test", "native", timedelta(seconds=60), *arguments, **options)
    (own,) = set(c10d._world.pg_map) - before
    return lane, own


def names_and_ranks(rank, world):
    """Groups of the same ranks, lanes of one group and those of its parts have names of their own, equal on their
    ranks; a lane's ranks are its group's, in its order."""
    others = [*alone([2]), *alone([0, 3])]
    groups = [dist.group.WORLD, dist.new_group(range(world)), dist.new_group([1, 0, 3, 2])]
    lanes = [made(group) for group in groups for _ in range(2)]
    lanes += [made(groups[0], ranks=ranks) for ranks in ([rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2])]
    told = [(dist.get_process_group_ranks(own), own.group_name, own.rank()) for _, own in lanes]
    everyones = [None] * world
    dist.all_gather_object(everyones, told)
    names = {}
    for whose, of_rank in enumerate(everyones):
        for number, (ranks, name, place) in enumerate(of_rank):
            assert ranks[place] == whose
            assert names.setdefault(name, (number, ranks)) == (number, ranks), (name, names[name], number, ranks)
    assert len(names) == 6 + 2 + 2
    for lane, own in lanes:
        assert (lane.rank, lane.world) == (own.rank(), own.size())
        tensor = torch.full((own.size(),), float(rank))
        dist.all_reduce(tensor, group=own)
        assert torch.all(tensor == sum(dist.get_process_group_ranks(own)))
    del others


def test_names_are_equal_on_all_ranks_and_on_no_two_lanes(pool4):
    pool4.run(names_and_ranks)


def in_another_order(rank, world):
    """A rank owns the chunk of its number in the user's group, whatever its number in the world is."""
    try:
        group = dist.new_group([1, 0], sort_ranks=False)
    except TypeError:  # torch 2.12 and before: ranks are in the order of the world
        return
    training.compare(rank, world, "Mlp", ddp={"process_group": group}, attach={**NATIVE, "update": "sharded"})


def test_ranks_in_another_order_than_in_the_world(pool2):
    pool2.run(in_another_order)
