"""A worker is killed in mid-training; torchrun starts all anew, and they end where an uninterrupted run ends."""

from __future__ import annotations

import random
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from restarts import attempt, equal, run

from dear._generation import agree_on_generation
from dear._ports import free_port

KILLS = ["1:13:forward", "0:13:backward", "1:14:save", "0:14:write", "1:0:start", "0:0:start"]
KILLS.append("1:7:backward,0:21:forward")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    output, final = run(tmp_path_factory.mktemp("uninterrupted"), "")
    assert "started at step 0" in output
    return final


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_a_job_comes_back(kills, uninterrupted, tmp_path):
    output, final = run(tmp_path, kills)
    last = int(kills.split(",")[-1].split(":")[1])
    assert f"started at step {last // 5 * 5}" in output
    assert equal(final, uninterrupted)


@pytest.mark.slow
def test_a_job_comes_back_with_a_static_rendezvous(uninterrupted, tmp_path):
    how = ("--master-addr=127.0.0.1", f"--master-port={free_port()}")
    _, final = run(tmp_path, "1:13:forward,0:16:backward", how)
    assert equal(final, uninterrupted)


@pytest.mark.slow
def test_a_try_is_told(uninterrupted):
    """What python tests/restarts.py counts."""
    told = attempt(random.Random(1), uninterrupted)
    assert told["came_back"] and told["resumed"] and told["bit_equal"], told
    other = {name: value + 1 for name, value in uninterrupted.items()}
    assert not equal(other, uninterrupted)


# The agreement on a name


def generation(store: dist.Store, ranks: list[int], world: int, seconds: float = 30.0) -> dict[int, str]:
    """What each of these ranks gets, or the sentence of its error."""
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            names[rank] = agree_on_generation(store, rank, world, timedelta(seconds=seconds))
        except RuntimeError as error:
            names[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_each_generation_has_one_name_of_its_own():
    store = dist.HashStore()
    seen = set()
    for _ in range(5):
        names = generation(store, [2, 0, 1], 3)
        assert len(set(names.values())) == 1, names
        seen |= set(names.values())
    assert len(seen) == 5


def test_those_who_died_before_they_had_a_name_do_not_matter():
    store = dist.HashStore()
    for dead in ([1], [1, 2], [2], [0, 1]):
        lost = generation(store, dead, 3, seconds=0.2)
        assert "not come within 0.2 s" in lost[dead[0]], lost  # rank 1 may have heard from a rank 0 that gave up
        names = generation(store, [0, 1, 2], 3)
        assert len(set(names.values())) == 1 and " " not in names[0], names


def test_who_is_missing_is_named():
    store = dist.HashStore()
    # Rank 1 must have come by then, also where the machine is busy.
    assert "since rank 2 has not come within 3 s" in generation(store, [0, 1], 3, 3)[0]
    assert "since ranks 1, 2, 3 have not come" in generation(store, [0], 4, 0.3)[0]
    assert "since rank 0 has not come" in generation(store, [1], 2, 0.3)[1]
