"""News of a failure: who is named, on whichever lane one waits; leaving, being late, Ctrl-C, forked children."""

import gc
import json
import os
import re
import signal
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupting import interrupted
from wire import HELLO, Between, Links, Watched, in_ranks, lane_of, peers
from workers import run_workers

from dear import _C
from dear._objects import all_gather_object, broadcast_object
from dear.collectives import make_lane

KINDS = [_C.RingLane, _C.MeshLane]


def submit(lane, numel=1000, label="fusion group 1"):
    full = torch.ones(numel * lane.world)
    if isinstance(lane, _C.MeshLane):
        return lane.submit(_C.Phase.all_to_all, _C.Reduction.sum, [(full, torch.empty_like(full))], label)
    return lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(full, torch.empty(numel))], label)


def lanes(kind, world, seconds, **settings):
    """A lane for each rank, all in this process."""
    store = dist.HashStore()
    made = in_ranks(world, lambda rank: lane_of(kind, store, "lane", seconds, peers(rank, world, **settings)))
    assert all(isinstance(lane, kind) for lane in made), made
    return made


def failure_of(exchange):
    with pytest.raises(RuntimeError) as caught:
        exchange.wait()
    return str(caught.value)


def two_lanes_of_which_each_waits_on_one(rank, world):
    one, other = (make_lane(dist.group.WORLD, name, "ring", timedelta(seconds=20)) for name in ("one", "other"))
    submit(one).wait()
    submit(other).wait()
    if rank == 2:
        os._exit(7)
    # Rank 3 hears of the death on one lane, and then leaves both; the others wait on the other one only.
    return failure_of(submit(one if rank == 3 else other))


def test_the_news_reaches_lanes_that_have_not_seen_the_death():
    outcomes = run_workers(two_lanes_of_which_each_waits_on_one, 4, expect_dead={2})
    for rank in (0, 1, 3):
        assert re.match(r"Rank 2 .* during the reduce-scatter of fusion group 1, as rank \d", outcomes[rank]), outcomes


def linked_lanes(world):
    """Two ring lanes of each rank, and the links they have."""
    links = Links()
    shared = [peers(rank, world) for rank in range(world)]
    made = [in_ranks(world, lambda rank, n=name: lane_of(_C.RingLane, links, n, 20, shared[rank])) for name in "ab"]
    for lanes_of in made:
        in_ranks(world, lambda rank, lanes_of=lanes_of: submit(lanes_of[rank]).wait())
    return made, links


@pytest.mark.parametrize("world", [3, 4])
def test_a_link_that_is_cut_between_living_ranks_is_named_by_all(world):
    """The connection of one lane from rank 1 to rank 2; that of the other lane stands."""
    (lanes_of, _), links = linked_lanes(world)
    links.cut(2, lane=0)
    said = [failure_of(exchange) for exchange in [submit(lane) for lane in lanes_of]]
    for sentence in said:
        assert re.match(r"Rank 1 and rank 2 lost a connection between them, while others stand", sentence), said
        assert re.search(r" during the reduce-scatter of fusion group 1, as rank [12] saw it\.$", sentence), said


def test_who_is_cut_off_from_all_says_so_and_is_named_by_all():
    """All connections of rank 2: from rank 1, and to rank 3."""
    (lanes_of, _), links = linked_lanes(4)
    links.cut(2)
    links.cut(3)
    said = [failure_of(exchange) for exchange in [submit(lane) for lane in lanes_of]]
    assert said[2].startswith("Rank 2 lost its connections to all other ranks at once"), said
    for rank in (0, 1, 3):
        assert re.match(r"Rank 2 closed its connection .*, as rank [13] saw it\.$", said[rank]), said


class Slow(dist.Store):
    """A store in which nobody is found to be ready the first times, so that a set-up has time to look around."""

    def __init__(self, inner):
        super().__init__()
        self._inner, self._asked = inner, 0

    def set(self, key, value):
        self._inner.set(key, value)

    def get(self, key):
        return self._inner.get(key)

    def check(self, keys):
        self._asked += any("/ready/" in key for key in keys)
        return self._inner.check(keys) and not (0 < self._asked < 60)


class EndsWhenReady(dist.Store):
    """A store with which a process ends once its connections for a lane are made, before it says so."""

    def __init__(self, inner):
        super().__init__()
        self._inner = inner

    def set(self, key, value):
        if "/ready/" in key:
            os._exit(7)
        self._inner.set(key, value)

    def get(self, key):
        return self._inner.get(key)

    def check(self, keys):
        return self._inner.check(keys)


def ends_in_set_up(rank, world, before):
    store, shared = dist.distributed_c10d._get_default_store(), peers(rank, world)
    if before:
        held = lane_of(_C.RingLane, store, "one", 600, shared)
        dist.barrier()
        if rank == 2:
            os._exit(7)
        assert held.rank == rank
    mine = EndsWhenReady(store) if rank == 2 else store
    with pytest.raises(RuntimeError) as caught:
        lane_of(_C.RingLane, mine, "two", 600, shared)
    return str(caught.value)


@pytest.mark.parametrize("before", [False, True])
def test_who_ends_while_a_lane_is_set_up_is_named_at_once(before):
    """In the middle of it; or before it, when there are connections of an earlier lane. The timeout is far away."""
    outcomes = run_workers(ends_in_set_up, 3, before, group_timeout=600, expect_dead={2})
    for rank in (0, 1):
        sentence = r"Rank 2 closed its connection .* during the set-up of communication lane two, as rank [01] saw it"
        assert re.match(sentence, outcomes[rank]), outcomes


def test_who_leaves_in_good_order_is_not_missed_by_the_next_lane():
    made, shared, store = {}, [peers(rank, 2) for rank in range(2)], dist.HashStore()
    made["a"] = in_ranks(2, lambda rank: lane_of(_C.RingLane, store, "a", 20, shared[rank]))
    made["a"][1] = None
    gc.collect()
    made["b"] = in_ranks(2, lambda rank: lane_of(_C.RingLane, Slow(store), "b", 20, shared[rank]))
    assert [lane.rank for lane in made["b"]] == [0, 1], made
    in_ranks(2, lambda rank: submit(made["b"][rank]).wait())


def test_who_leaves_behind_its_own_part_of_an_exchange_is_not_missed():
    """The other rank hears of it in the middle of that exchange, of which it has sent everything."""
    plain, passes = dist.HashStore(), threading.Event()

    def late(at, data):  # what rank 1 sends to rank 0 in an exchange
        if at >= HELLO:
            passes.wait()

    store = Watched(plain, lambda rank, host, port: Between((host, port), late).port if rank == 0 else port)
    shared = [peers(rank, 2) for rank in range(2)]
    made = in_ranks(2, lambda rank: lane_of(_C.RingLane, store, "a", 20, shared[rank]))
    first, second = (submit(lane) for lane in made)
    second.wait()
    made[1] = None
    gc.collect()
    time.sleep(0.2)  # rank 0 hears it
    passes.set()
    first.wait()
    others = in_ranks(2, lambda rank: lane_of(_C.RingLane, Slow(plain), "b", 20, shared[rank]))
    assert all(isinstance(lane, _C.RingLane) for lane in others), others


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_says_so(kind):
    made = lanes(kind, 3, 20)
    in_ranks(3, lambda rank: submit(made[rank]).wait())
    waiting = [submit(made[0]), submit(made[2])]
    made[1] = None
    gc.collect()
    for exchange in waiting:
        assert re.match(r"Rank 1 left \(its engine was detached or dropped.* of fusion group 1", failure_of(exchange))


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_aborted_says_why(kind):
    made = lanes(kind, 2, 20)
    exchange = submit(made[0])
    made[1].abort("Rank 1 left the engine's context with KeyError.")
    assert failure_of(exchange).startswith("Rank 1 left the engine's context with KeyError during the ")


def test_who_leaves_in_the_middle_is_heard_behind_what_is_still_on_its_way():
    """The other rank takes it slowly, and has itself sent what the leaving one never reads: a connection that is closed
    so ends at once."""

    def slowly(at, data):
        if at >= HELLO:
            time.sleep(0.05)

    def seen(rank, host, port):
        return Between((host, port), slowly).port if rank == 1 else port

    store = Watched(dist.HashStore(), seen)
    made = in_ranks(2, lambda rank: lane_of(_C.MeshLane, store, "lane", 60, peers(rank, 2)))
    exchanges = [submit(lane, 16_000_000) for lane in made]
    made[0].abort("Rank 0 has had enough.")
    assert failure_of(exchanges.pop(0)).startswith("Rank 0 has had enough")
    made[0] = None  # at once
    assert failure_of(exchanges[0]).startswith("Rank 0 has had enough during the all-to-all"), failure_of(exchanges[0])


@pytest.mark.parametrize("numel", [1000, 4_000_000])  # less than sockets hold, and more
@pytest.mark.parametrize("world", [2, 3])
def test_who_is_late_hears_the_cause(world, numel):
    made = lanes(_C.RingLane, world, 4)
    others = [failure_of(exchange) for exchange in [submit(made[r], numel) for r in range(world) if r != 1]]
    late = failure_of(submit(made[1], numel))
    # Two ranks may find it at the same moment; who saw it first is the clock's choice.
    assert len({re.sub(r"as rank \d saw it", "", said) for said in (late, *others)}) == 1, (late, others)
    # Of two ranks the one has seen nothing of the other, and waits longer; of three it depends on who finds it.
    patience = "4500" if world == 2 else "4[05]00"
    assert re.match(rf"Rank 1 sent or took nothing for {patience} ms .* of fusion group 1, as rank \d saw it", late), (
        late
    )


def test_the_flight_recorder_writes_what_each_lane_was_doing(tmp_path):
    path = str(tmp_path / "flight")
    store = dist.HashStore()
    shared = [peers(rank, 2, recorder=path) for rank in range(2)]
    made = {
        name: in_ranks(2, lambda rank, name=name: lane_of(_C.RingLane, store, name, 4, shared[rank]))
        for name in ("reduce-scatter/0", "all-gather/1")
    }
    for group in range(20):
        in_ranks(2, lambda rank, group=group: submit(made["all-gather/1"][rank], label=f"fusion group {group}").wait())
    waits = submit(made["reduce-scatter/0"][0], label='the "last" one')
    submit(made["reduce-scatter/0"][0], label="one more")
    sentence = failure_of(waits)
    record = json.loads((tmp_path / "flight.0").read_text())
    assert (record["rank"], record["world"], record["error"]) == (0, 2, sentence)
    moving, idle = sorted(record["lanes"], key=lambda lane: lane["name"], reverse=True)
    assert (moving["name"], moving["state"]) == ("reduce-scatter/0", "moving")
    assert (moving["current"]["label"], moving["current"]["sequence"]) == ('the "last" one', 0)
    assert [exchange["label"] for exchange in moving["queued"]] == ["one more"]
    assert [(peer["rank"], peer["received"]) for peer in moving["peers"]] == [(1, 0)]
    assert (idle["name"], idle["state"], idle["current"]) == ("all-gather/1", "idle", None)
    assert [exchange["label"] for exchange in idle["ended"]] == [f"fusion group {group}" for group in range(4, 20)]
    assert all(exchange["start_ns"] < exchange["end_ns"] for exchange in idle["ended"])


# ----------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_ends_a_wait():
    """The lane's own timeout is longer than this test may take."""
    made = lanes(_C.RingLane, 2, 600)
    exchange = submit(made[0])
    with interrupted():
        exchange.wait()
    assert not exchange.done()
    submit(made[1])
    exchange.wait()  # it went on


def native_waits(rank, world, phase, come):
    lane = make_lane(dist.group.WORLD, "a lane", "native", timedelta(seconds=600))
    full = torch.full((2000,), float(rank))
    shard = torch.empty(2000) if phase == "all_to_all" else torch.ones(1000)

    def start():
        return lane.submit(getattr(_C.Phase, phase), _C.Reduction.average, [(full, shard)], "fusion group 1")

    if rank == 1:
        while not os.path.exists(come):
            time.sleep(0.05)
        start().wait()
        return
    exchange = start()
    with interrupted():
        exchange.wait()
    assert not exchange.done()
    Path(come).touch()
    while not exchange.done():  # it went on, and says when it has ended
        time.sleep(0.01)
    exchange.wait()
    want = {"reduce_scatter": torch.full((1000,), 0.5), "all_to_all": torch.tensor([0.0, 1.0]).repeat_interleave(1000)}
    assert phase == "all_gather" or torch.equal(shard, want[phase])


@pytest.mark.parametrize("phase", ["reduce_scatter", "all_gather", "all_to_all"])
def test_ctrl_c_ends_a_wait_for_the_backend(pool2, tmp_path, phase):
    pool2.run(native_waits, phase, str(tmp_path / "come"), group_timeout=600)


def test_ctrl_c_ends_set_up():
    with interrupted():
        lane_of(_C.RingLane, dist.HashStore(), "lane", 600, peers(0, 2))


# ------------------------------------------------------------------------------------------------------- fork


def in_child(work):
    """The exit status of a forked child that runs `work`; 0 where it returns."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    for _ in range(300):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_neither_hangs_nor_disturbs_its_parent(kind):
    made = lanes(kind, 2, 30)
    exchanges = [submit(made[0], 2_000_000)]  # under way

    def child():
        for call in (exchanges[0].wait, lambda: submit(made[0])):
            with pytest.raises(RuntimeError, match="this is a child forked from that one"):
                call()
        made[0].abort("Rank 0 must not be heard.")
        exchanges.clear()
        made.clear()
        gc.collect()

    assert in_child(child) == 0
    other = submit(made[1], 2_000_000)
    exchanges[0].wait()
    other.wait()
    in_ranks(2, lambda rank: submit(made[rank]).wait())


# ---------------------------------------------------------------------------------------------------- objects


def test_objects_go_round():
    made = lanes(_C.RingLane, 3, 20)
    values = [{"rank": rank, "tensor": torch.arange(rank * 1000)} for rank in range(3)]
    for gathered in in_ranks(3, lambda rank: all_gather_object(made[rank], values[rank], "a state")):
        assert [one["rank"] for one in gathered] == [0, 1, 2]
        assert all(torch.equal(one["tensor"], value["tensor"]) for one, value in zip(gathered, values, strict=True))
    for size in (0, 1, 100_000):
        value = list(range(size))
        outcomes = in_ranks(
            3, lambda rank, value=value: broadcast_object(made[rank], value if rank == 0 else None, "an order")
        )
        assert outcomes == [value] * 3


def test_who_does_not_exchange_objects_is_named():
    made = lanes(_C.RingLane, 2, 4)
    with pytest.raises(RuntimeError, match=r"Rank 1 .* during the all-gather of the optimizer's state, as rank 0"):
        all_gather_object(made[0], 1, "the optimizer's state")
