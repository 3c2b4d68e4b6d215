"""The harness itself: results, failures, hangs and deaths, and that no process outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
import workers
from workers import RemoteTraceback, WorkerDied, WorkerPool, WorkerTimeout, alive, run_workers


def total(rank: int, world_size: int, length: int) -> torch.Tensor:
    x = torch.full((length,), float(rank + 1))
    dist.all_reduce(x)
    return x


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def hash_of_a_word(rank: int, world_size: int) -> int:
    return hash("word")


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one objects")
    dist.barrier()


def hang_on_one(rank: int, world_size: int) -> None:
    print("about to hang", flush=True)
    if rank == 1:
        time.sleep(1000)


def die_on_one(rank: int, world_size: int, number: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), number)
    dist.all_reduce(torch.ones(1))


class Odd(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def raise_odd(rank: int, world_size: int) -> None:
    raise Odd(1, 2)


def exits_with_three(rank: int, world_size: int) -> None:
    import atexit

    atexit.register(os._exit, 3)


def gone(pids: list[int], within: float = 60.0) -> bool:
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_fresh_processes_give_results_by_rank() -> None:
    results = run_workers(total, 3, 5)
    assert all(torch.equal(result, torch.full((5,), 6.0)) for result in results)


def test_pool_keeps_its_processes_and_renews_the_group(pool2: WorkerPool) -> None:
    before = pool2.run(pid)
    assert torch.equal(pool2.run(total, 4)[1], torch.full((4,), 3.0))
    assert pool2.run(pid) == before == pool2.pids


def test_neighbours_order_their_sets_differently(pool2: WorkerPool) -> None:
    """As fresh processes do: what relies on one order must part the ranks."""
    first, second = pool2.run(hash_of_a_word)
    assert first != second


def test_failure_is_raised_with_its_traceback_and_the_pool_recovers(pool2: WorkerPool) -> None:
    before = pool2.run(pid)
    start = time.monotonic()
    with pytest.raises(ValueError, match="rank one objects") as caught:
        pool2.run(fail_on_one)
    assert time.monotonic() - start < 50
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "worker 1" in str(caught.value.__cause__) and "fail_on_one" in str(caught.value.__cause__)
    assert gone(before)
    assert torch.equal(pool2.run(total, 1)[0], torch.full((1,), 3.0))


def test_exception_that_does_not_unpickle() -> None:
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        run_workers(raise_odd, 1)


def test_hang_ends_at_the_timeout_and_shows_where(pool2: WorkerPool) -> None:
    before = pool2.run(pid)
    with pytest.raises(WorkerTimeout, match=r"worker 1 had not finished(.|\n)*about to hang(.|\n)*hang_on_one"):
        pool2.run(hang_on_one, timeout=5.0)
    assert gone(before)


def test_unexpected_death_is_raised() -> None:
    with pytest.raises(WorkerDied, match="worker 1 died with exit code -9"):
        run_workers(die_on_one, 2, signal.SIGKILL)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],
    ids=["dies", "stalls"],
)
def test_expected_death_collects_what_survivors_raised(number: int) -> None:
    survivor, dead = run_workers(die_on_one, 2, number, expect_dead={1}, group_timeout=10.0)
    assert isinstance(survivor, RuntimeError)
    assert isinstance(dead, WorkerDied) and dead.rank == 1
    assert dead.stalled == (number == signal.SIGSTOP)


def test_expected_death_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LAST", 60.0)  # its answer may come late where the machine is busy
    with pytest.raises(AssertionError, match="worker 1 was to die"):
        run_workers(pid, 2, expect_dead={1})


def test_unclean_exit_is_a_failure() -> None:
    with pytest.raises(WorkerDied, match="exit code 3"):
        run_workers(exits_with_three, 1)


def test_workers_die_with_the_test_process() -> None:
    script = (
        "from workers import WorkerPool; import test_workers as t; p = WorkerPool(2); p.run(t.pid); "
        "print(*p.pids, flush=True); p.run(t.hang_on_one)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(pids)


def hold_exit_if_it_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(1)
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise OSError("and a thread that does not end")


@pytest.mark.slow
def test_survivor_that_cannot_end_is_a_failure() -> None:
    with pytest.raises(WorkerTimeout, match="at exit: worker 0"):
        run_workers(hold_exit_if_it_fails, 2, expect_dead={1}, timeout=30.0)
