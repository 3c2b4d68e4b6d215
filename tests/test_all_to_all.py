"""All-to-alls over a mesh of connections: exact, failures that name who failed, misuse refused."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from place import place
from workers import WorkerDied, run_workers

import dear
from dear import _C
from dear.collectives import make_lane

CHUNKS = [0, 1, 3, 1000, 300_000]  # elements to each rank; the last is several pieces


def mesh(timeout=60):
    return make_lane(dist.group.WORLD, "mesh", "ring", timedelta(seconds=timeout), all_to_all=True)


def submit(lane, pairs):
    return lane.submit(_C.Phase.all_to_all, _C.Reduction.sum, pairs, "a call")


def rows(sender, world, chunk, dtype):
    """What a rank sends: row r goes to rank r."""
    generator = torch.Generator().manual_seed(sender)
    return torch.randint(0, 100, (world, chunk), generator=generator).to(place(), dtype)


def everybody_gets_their_rows(rank, world):
    lane = mesh()
    works = []
    for dtype in (torch.int32, torch.float64, torch.uint8):
        for chunks in [[chunk] for chunk in CHUNKS] + [CHUNKS, []]:  # one part, several, none
            sent = [rows(rank, world, chunk, dtype).view(-1) for chunk in chunks]
            received = [torch.full_like(tensor, 9) for tensor in sent]
            works.append((submit(lane, list(zip(sent, received, strict=True))), chunks, dtype, sent, received))
    for work, chunks, dtype, sent, received in works:
        work.wait()
        for chunk, kept, got in zip(chunks, sent, received, strict=True):
            assert torch.equal(kept, rows(rank, world, chunk, dtype).view(-1)), "the input was changed"
            want = torch.cat([rows(sender, world, chunk, dtype)[rank] for sender in range(world)])
            assert torch.equal(got, want), (chunk, dtype)


@pytest.mark.parametrize("world", [2, 4])
def test_everybody_gets_their_rows(world, pool2, pool4):
    (pool2 if world == 2 else pool4).run(everybody_gets_their_rows)


def test_everybody_gets_their_rows_on_three_ranks_and_on_one(pool3, pool1):
    pool3.run(everybody_gets_their_rows)
    pool1.run(everybody_gets_their_rows)


def ranks_that_come_late(rank, world):
    lane = mesh()
    for late in range(world):  # who is waited for, and is then behind with what the others have sent
        sent = rows(rank, world, 200_000, torch.int32).view(-1)
        received = torch.empty_like(sent)
        if rank == late:
            time.sleep(1.5)
        submit(lane, [(sent, received)]).wait()
        assert torch.equal(received, torch.cat([rows(r, world, 200_000, torch.int32)[rank] for r in range(world)]))


def test_ranks_that_come_late(pool4):
    pool4.run(ranks_that_come_late)


def one_is_missing(rank, world, how, where):
    lane = mesh(timeout=10)
    # More than sockets hold: the missing one is in the way of what is sent to the others.
    sent = torch.ones(world * 4_000_000)
    received = torch.empty_like(sent)
    submit(lane, [(sent, received)]).wait()
    if rank == where:
        if how == "dies":
            os._exit(7)
        time.sleep(1000)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        submit(lane, [(sent, received)]).wait()
    assert time.monotonic() - start < 50
    with pytest.raises(RuntimeError):  # and so does everything after it, at once
        submit(lane, [(sent, received)]).wait()
    return str(caught.value)


@pytest.mark.parametrize("how", ["dies", pytest.param("stalls", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("world", "where"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_every_survivor_names_the_missing_rank(world, where, how):
    outcomes = run_workers(one_is_missing, world, how, where, group_timeout=10, expect_dead={where})
    assert isinstance(outcomes[where], WorkerDied)
    for rank, outcome in enumerate(outcomes):
        if rank != where:
            assert isinstance(outcome, str), outcome
            assert outcome.startswith(f"Rank {where} ") and "the all-to-all of a call" in outcome, outcome


def aborted(rank, world):
    lane = mesh()
    tensor = torch.ones(world * 100_000)
    if rank == 1:
        lane.abort("Rank 1 has changed its mind.")
    with pytest.raises(RuntimeError, match=r"Rank 1 has changed its mind|Rank 1 closed its connection"):
        submit(lane, [(tensor, torch.empty_like(tensor))]).wait()


def test_an_aborted_lane_ends_the_others(pool3):
    pool3.run(aborted, group_timeout=100)


def other_sizes(rank, world):
    lane = mesh()
    tensor = torch.ones(10 * world if rank else 100_000 * world)
    with pytest.raises(RuntimeError, match=r"another collective|closed its connection"):
        submit(lane, [(tensor, torch.empty_like(tensor))]).wait()


def test_other_sizes_are_noticed_at_once(pool2):
    pool2.run(other_sizes, group_timeout=100)


def misuse(rank, world):
    lane = mesh()
    with pytest.raises(RuntimeError, match="each rank a chunk of the same size"):
        submit(lane, [(torch.ones(5), torch.ones(5))])
    with pytest.raises(RuntimeError, match="all-gather was asked for: use a ring"):
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(torch.ones(4), torch.ones(2))], "a call")


def test_misuse_is_one_sentence(pool2):
    pool2.run(misuse)


def the_public_call(rank, world, algorithm):
    for dtype, chunk in [(torch.float32, 1000), (torch.int32, 0), (torch.bfloat16, 7)]:
        sent = rows(rank, world, chunk, dtype)
        received = torch.full_like(sent, 9)
        want = torch.stack([rows(sender, world, chunk, dtype)[rank] for sender in range(world)])
        assert torch.equal(dear.all_to_all(sent, received, algorithm=algorithm).wait(), want), (dtype, chunk)
        assert torch.equal(sent, rows(rank, world, chunk, dtype)), "the input was changed"
    total = torch.ones(world, device=place())
    assert dear.all_reduce(total, algorithm=algorithm).wait().eq(world).all()  # the halves' lane is another one


@pytest.mark.parametrize("algorithm", ["ring", "native", None])
def test_the_public_call(algorithm, pool4):
    pool4.run(the_public_call, algorithm)


def the_public_call_in_a_part_of_the_world(rank, world, algorithm):
    # The lane may hold the group's last reference. Its end joins the backend's threads, of which one may be waiting for
    # the GIL to let go of the tensors: destroyed with the GIL held it hung here, within a few groups.
    for _ in range(30):
        groups = [dist.new_group([0, 1])]
        if rank < 2:
            sent, received = torch.arange(20_000.0) + rank, torch.zeros(20_000)
            want = torch.arange(20_000.0).view(2, -1)[rank].repeat(2)
            want[10_000:] += 1
            assert torch.equal(dear.all_to_all(sent, received, groups[0], algorithm=algorithm).wait(), want)
            del sent, received
            dist.destroy_process_group(groups.pop())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ring", "native"])
def test_the_public_call_in_a_part_of_the_world(algorithm):
    run_workers(the_public_call_in_a_part_of_the_world, 4, algorithm, timeout=100)


def public_misuse(rank, world):
    x = torch.zeros(4)
    for call, message in [
        (lambda: dear.all_to_all(torch.zeros(5), torch.zeros(5)), "5 elements have none: pad the input"),
        (lambda: dear.all_to_all(x, torch.zeros(3)), "must be 4 elements of torch.float32, not 3"),
        (lambda: dear.all_to_all(x, torch.zeros(4, dtype=torch.int32)), "not 4 of torch.int32"),
        (lambda: dear.all_to_all(x, x), "must not be its input"),
        (lambda: dear.all_to_all(torch.zeros(2, 2).t(), x), "must be contiguous"),
        (lambda: dear.all_to_all(x, torch.zeros(4), algorithm="tree"), 'algorithm must be "ring"'),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_public_misuse_is_one_sentence(pool2):
    pool2.run(public_misuse)
