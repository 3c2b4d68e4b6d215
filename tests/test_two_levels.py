"""Two levels, of two nodes with two ranks each: the sums of one level, fewer bytes between nodes, and who has died."""

import copy
import os
import signal
from unittest import mock

import pytest
import torch
import training
from place import place
from torch.distributed import distributed_c10d as c10d
from training import SMALL
from workers import WorkerDied, run_workers

import dear
from dear import _C
from dear._nodes import Nodes, _grouped, find_nodes, make_lane_by_levels
from dear.collectives import group_timeout

SIZE = 2  # ranks in a node
CONSECUTIVE, ALTERNATING = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
LENGTHS = [0, 1, 2, 3, 5, 7, 1000, 100_003]
UNEVEN = [[(0, 5), (900, 1000)], [(5, 6)], [], [(6, 500), (700, 800)]]  # of a thousand, some of which nobody owns


def levelled(nodes, algorithm="ring"):
    group = c10d._get_default_group()
    timeout = group_timeout(group, place())
    return make_lane_by_levels(group, "test", algorithm, timeout, Nodes(nodes, group.rank()))


def whole_numbers(rank, length, dtype):
    return torch.randint(0, 8, (length,), generator=torch.Generator().manual_seed(rank)).to(place(), dtype)


def owned_by(bounds, full, rank):
    return torch.cat([full[begin:end] for begin, end in bounds[rank]] or [full[:0]])


def halves_are_exact(rank, world, nodes, algorithm):
    lane = levelled(nodes, algorithm)
    assert (lane.rank, lane.world) == (rank, world)
    even = {n: [[dear.shard_range(n, world, r)] for r in range(world)] for n in LENGTHS}
    cases = [(n, bounds, []) for n, bounds in even.items()] + [(1000, UNEVEN, [_C.Ownership(1000, UNEVEN)])]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32):
        for length, bounds, owners in cases:
            everyone = [whole_numbers(r, length, dtype) for r in range(world)]
            total, mine = torch.stack(everyone).sum(0).to(dtype), everyone[rank].clone()
            shard = total.new_empty(len(owned_by(bounds, mine, rank)))
            lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(mine, shard)], "a sum", owners).wait()
            assert torch.equal(shard, owned_by(bounds, total, rank)), (dtype, length)
            assert torch.equal(mine, everyone[rank]), "the input was changed"
            gathered = torch.full_like(total, 9)
            for begin, end in bounds[rank]:
                gathered[begin:end] = total[begin:end]
            part = [(gathered, gathered[:0])]
            lane.submit(_C.Phase.all_gather, _C.Reduction.sum, part, "a gathering", owners).wait()
            for owner in range(world):
                assert torch.equal(owned_by(bounds, gathered, owner), owned_by(bounds, total, owner)), (dtype, length)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("nodes", [CONSECUTIVE, ALTERNATING], ids=["consecutive", "alternating"])
def test_halves_are_exact(pool4, nodes, algorithm):
    pool4.run(halves_are_exact, nodes, algorithm)


def means_and_bytes(rank, world):
    """A mean over all ranks; and each half carries half of the elements that a rank's place owns to the other node."""
    lane, length = levelled(CONSECUTIVE), 4000
    values = [torch.randn(length, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    begin, end = dear.shard_range(length, world, rank)
    mean, mine = torch.stack(values).double().mean(0), values[rank].clone()
    pair = [(mine, mine[begin:end])]
    lane.submit(_C.Phase.reduce_scatter, _C.Reduction.average, pair, "a mean").wait()
    torch.testing.assert_close(mine[begin:end].double(), mean[begin:end], rtol=1e-6, atol=1e-7)
    assert lane.bytes_inside == 4 * length // 2
    assert lane.bytes_between == 4 * length // (2 * SIZE)
    lane.submit(_C.Phase.all_gather, _C.Reduction.sum, pair, "a mean").wait()
    torch.testing.assert_close(mine.double(), mean, rtol=1e-6, atol=1e-7)
    assert lane.bytes_between == 2 * 4 * length // (2 * SIZE)
    # Several at once, of both kinds, in one order.
    many = [torch.full((3000 + i,), float(rank)) for i in range(20)]
    works = []
    for tensor in many:
        own = tensor[slice(*dear.shard_range(tensor.numel(), world, rank))]
        works.append(lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(tensor, own)], "one of many"))
        works[-1].wait()
        works.append(lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(tensor, own)], "one of many"))
    for work in reversed(works):
        work.wait()
    assert all(torch.equal(tensor, torch.full_like(tensor, 6.0)) for tensor in many)


def test_means_and_bytes(pool4):
    pool4.run(means_and_bytes)


def trains_alike(rank, world, update, algorithm):
    for model in ("Mlp", "Tied", "Unused"):
        ddp = {"find_unused_parameters": True} if model == "Unused" else {}
        attach = {**SMALL, "update": update, "hierarchy": SIZE, "algorithm": algorithm}
        training.compare(rank, world, model, ddp=ddp, attach=attach, exact=False)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_training_is_that_of_plain_ddp_to_rounding(pool4, update, algorithm):
    pool4.run(trains_alike, update, algorithm)


def in_nodes_of_the_launcher(rank, world):
    """With the nodes that torchrun would tell of, training is that of nodes of so many ranks, bit for bit."""
    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank % SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}):
        losses, found = training.train(rank, "Mlp", attach={**SMALL, "hierarchy": "node"})
    want_losses, want = training.train(rank, "Mlp", attach={**SMALL, "hierarchy": SIZE})
    assert losses == want_losses and all(torch.equal(found[name], value) for name, value in want.items())
    _, one_level = training.train(rank, "Mlp", attach=SMALL)
    assert any(not torch.equal(found[name], value) for name, value in one_level.items()), "it was one level"


def test_nodes_of_the_launcher(pool4):
    pool4.run(in_nodes_of_the_launcher)


def resumes(rank, world, update):
    attach = {**SMALL, "update": update, "hierarchy": SIZE}

    def steps(model, optimizer, numbers):
        return [training.plain_step(model, optimizer, rank, step) for step in numbers]

    model, optimizer = training.build("Mlp", training.SGD, {})
    with dear.attach(model, optimizer, **attach) as engine:
        steps(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), engine.state_dict()))
        want = steps(model, optimizer, range(3, 6))
    model, optimizer = training.build("Mlp", training.SGD, {})
    model.load_state_dict(saved[0])
    with dear.attach(model, optimizer, **attach) as engine:
        engine.load_state_dict(saved[1])
        assert steps(model, optimizer, range(3, 6)) == want


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_resumed_run_is_the_run_that_would_have_been(pool4, update):
    pool4.run(resumes, update)


def finds(rank, world):
    group = c10d._get_default_group()
    assert find_nodes(group, None) is None
    assert find_nodes(group, 1) is None and find_nodes(group, world) is None
    assert find_nodes(group, SIZE).ranks == CONSECUTIVE
    assert find_nodes(group, SIZE).between == [rank % SIZE, rank % SIZE + SIZE]
    os.environ |= {"LOCAL_RANK": str(rank % SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    assert find_nodes(group, "node").inside == CONSECUTIVE[rank // SIZE]
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    assert find_nodes(group, "node") is None, "all ranks are on one host"
    with pytest.raises(ValueError, match="hierarchy=3 does not divide 4 ranks"):
        find_nodes(group, 3)
    model, optimizer = training.build("Mlp", training.SGD, {})
    with pytest.raises(ValueError, match='hierarchy must be None, "node" or how many ranks a node has, not 0'):
        dear.attach(model, optimizer, hierarchy=0)
    with pytest.raises(ValueError, match="disagree on hierarchy"):
        dear.attach(model, optimizer, hierarchy=2 if rank else None)


def test_nodes_are_found(pool4):
    pool4.run(finds)


def test_nodes_by_what_ranks_know():
    by_launcher = [("same", str(rank % 2), "2") for rank in range(4)]
    assert _grouped(by_launcher) == CONSECUTIVE
    in_turn = [("ab"[rank % 2], str(rank // 2), "2") for rank in range(4)]  # numbered across the nodes
    assert _grouped(in_turn) == ALTERNATING
    assert _grouped([("a", None, None), ("b", None, None)]) == [[0], [1]]
    with pytest.raises(ValueError, match="nodes of 1 to 3 ranks"):
        _grouped([(host, None, None) for host in "aaab"])


def dies(rank, world):
    model, optimizer = training.build("Mlp", training.SGD, {})
    dear.attach(model, optimizer, **SMALL, hierarchy=SIZE)
    for step in range(10):
        if rank == 3 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        training.plain_step(model, optimizer, rank, step)


@pytest.mark.slow
def test_a_dead_peer_is_named_on_every_rank():
    results = run_workers(dies, 4, expect_dead={3})
    assert isinstance(results[3], WorkerDied)
    for rank in range(3):  # rank 0 has no connection to rank 3: those who have one tell it
        assert "Rank 3 " in str(results[rank]), results[rank]
