"""Functions of a test run as the ranks of a gloo process group, each in a process of its own, on loopback.

    from workers import run_workers

    def sums(rank, world_size, length):          # module level: it travels by name
        x = torch.full((length,), float(rank))
        dist.all_reduce(x)
        return x

    def test_sum():
        assert torch.equal(*run_workers(sums, 2, 5))

`run_workers` starts new processes and also demands that they exit cleanly. `WorkerPool` keeps its processes; the
fixtures `pool1` to `pool4` hold one each. Processes are forks of one that has imported everything (forking.py).

A worker that hangs ends the test at `timeout`, with the stack of every thread of every worker still running. Workers
end as those of the benchmarks do (benchmarks/processes.py): with this process, however it ends.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import forking

from benchmarks.processes import MARK, Processes

# Setting up a process group may take this long (seconds), however short the timeout of its collectives is: a busy
# machine starts processes late.
SET_UP = 60.0
# After a first failure the other ranks get this long (seconds) to report theirs, which often tells more.
GRACE = 2.0
# Those that are to die or to stall get this long (seconds) when all others are done.
LAST = 0.5
# A process that hangs gets this long (seconds) to begin to say where; one that is stopped says nothing.
STACKS = 10.0


class WorkerDied(Exception):
    """A worker ended without a result. `exitcode` is negative for a signal; `stalled` if it had to be killed."""

    def __init__(self, rank: int, exitcode: int, output: str = "", stalled: bool = False) -> None:
        how = "was still running and got killed" if stalled else f"died with exit code {exitcode}"
        super().__init__(f"worker {rank} {how}{_quoted(output)}")
        self.rank, self.exitcode, self.stalled = rank, exitcode, stalled


class WorkerTimeout(Exception):
    """Workers had not finished in time; the message holds the stacks of those that hung."""


class RemoteTraceback(Exception):
    """The cause of a re-raised failure: the traceback as the worker saw it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _quoted(output: str) -> str:
    return f"; its last output:\n{output.rstrip()}" if output.strip() else ""


# --------------------------------------------------------------------------------------------- the test's side


def run_workers(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 200.0,
    group_timeout: float = 100.0,
    expect_dead: Collection[int] | None = None,
    backend: str | None = "gloo",
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` in `world_size` fresh processes and returns its results by rank.

    timeout, group_timeout: seconds for the whole run, and of the process group (what its collectives wait at most).
    expect_dead: None raises the first failure of any rank, with the worker's traceback as its cause. A set of ranks
        collects instead: the list then holds, per rank, its result, the exception it raised, or `WorkerDied`. Those
        in the set must not return: they die, or are killed when all others are done. The others must not die, and
        must be able to exit cleanly after what they went through.
    backend: None leaves the process group to `fn`.
    env: added to the workers' environment.

    Raises a worker's own exception, WorkerDied, WorkerTimeout, or AssertionError where `expect_dead` is not met.
    """
    with WorkerPool(world_size, env=env) as pool:
        results = pool.run(
            fn, *args, timeout=timeout, group_timeout=group_timeout, expect_dead=expect_dead, backend=backend
        )
        pool.exit_cleanly(timeout)
        return results


class WorkerPool:
    """`world_size` processes that run one function after another, each in a new process group.

    A run that fails, or in which a worker died, ends the processes; the next run starts new ones.
    """

    def __init__(self, world_size: int, env: Mapping[str, str] | None = None) -> None:
        self.world_size = world_size
        self._env = dict(env or {})
        self._workers: list[_Worker] = []
        self._processes: Processes | None = None
        self._store: Any = None
        self._runs = 0

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 200.0,
        group_timeout: float = 100.0,
        expect_dead: Collection[int] | None = None,
        backend: str | None = "gloo",
    ) -> list[Any]:
        """As `run_workers`, in the pool's processes."""
        deadline = time.monotonic() + timeout
        task = pickle.dumps((fn, args))  # before anything starts: what cannot travel is the caller's mistake
        clean = False
        try:
            self._start()
            self._runs += 1
            job = (task, backend, self._store.port, f"run{self._runs}", group_timeout)
            for worker in self._workers:
                worker.connection.send(job)
            outcomes = self._collect(deadline, expect_dead)
            # Groups are left only when every rank is through: one leaving early would fail another's last collective.
            self._leave_groups(outcomes, deadline)
            if any(isinstance(outcome, BaseException) for outcome in outcomes):
                self.exit_cleanly(max(5.0, deadline - time.monotonic()))  # survivors, too, must be able to end
            clean = True
        finally:
            if not clean:
                self.kill()
        return outcomes

    def _start(self) -> None:
        if any(worker.process.poll() is not None for worker in self._workers):
            self.kill()
        if self._workers:
            return
        from torch.distributed import TCPStore

        # Held by the test's process, as torchrun's agent does: it outlives rank 0, and nobody else can take the port.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = self._processes or Processes()
        for rank in range(self.world_size):
            self._workers.append(_Worker(self._processes, rank, self.world_size, self._env))

    def _collect(self, deadline: float, expect_dead: Collection[int] | None) -> list[Any]:
        """Outcomes by rank: results and, where failures are expected, exceptions."""
        pending = {worker.connection: worker for worker in self._workers}
        outcomes: dict[int, Any] = {}
        first: BaseException | None = None
        expected = set(expect_dead or ())
        while pending:
            if expect_dead is not None and all(w.rank in expected for w in pending.values()):
                deadline = min(deadline, time.monotonic() + LAST)  # only those left that are to die or to stall
            for connection in wait(list(pending), max(0.0, deadline - time.monotonic())):
                worker = pending.pop(connection)  # type: ignore[call-overload]
                ok, value = worker.receive()
                outcomes[worker.rank] = value
                if not ok and expect_dead is None and first is None:
                    first = value
                    deadline = min(deadline, time.monotonic() + GRACE)
            if pending and time.monotonic() >= deadline:
                if first is not None:
                    break
                hung = [worker for worker in pending.values() if worker.rank not in expected]
                if hung:
                    raise WorkerTimeout("\n".join(worker.hung() for worker in hung))
                for worker in pending.values():
                    outcomes[worker.rank] = worker.stalled()
                break
        if first is not None:  # what survivors say of a death may come before it is seen
            raise next((each for each in outcomes.values() if isinstance(each, WorkerDied)), first)
        for rank, outcome in outcomes.items():
            if isinstance(outcome, WorkerDied) and rank not in expected:
                raise AssertionError(f"worker {rank} was to survive, but died") from outcome
            if not isinstance(outcome, WorkerDied) and rank in expected:
                raise AssertionError(f"worker {rank} was to die or stall, but came back with {outcome!r}")
        return [outcomes[rank] for rank in range(self.world_size)]

    def _leave_groups(self, outcomes: list[Any], deadline: float) -> None:
        alive = [w for w in self._workers if not isinstance(outcomes[w.rank], WorkerDied)]
        for worker in alive:
            worker.connection.send(None)
        for worker in alive:
            if not worker.connection.poll(max(1.0, deadline - time.monotonic())):
                raise WorkerTimeout("while leaving its process group: " + worker.hung())
            ok, value = worker.receive()
            if not ok:
                raise value

    def exit_cleanly(self, timeout: float = 10.0) -> None:
        """Ends the living, who must exit with 0 by themselves within `timeout` seconds: no thread may hold them."""
        deadline = time.monotonic() + timeout
        living = [worker for worker in self._workers if worker.process.returncode is None]
        try:
            for worker in living:
                worker.connection.close()
            for worker in living:
                try:
                    exitcode = worker.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise WorkerTimeout("at exit: " + worker.hung()) from None
                if exitcode:
                    raise WorkerDied(worker.rank, exitcode, worker.output())
        finally:
            self.kill()

    def kill(self) -> None:
        for worker in self._workers:
            worker.close()
        if self._processes is not None:
            self._processes.close()  # and whatever workers have started and left
        self._processes = None
        self._workers.clear()
        self._store = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Worker:
    """One process, its pipe, and a file that takes what it prints."""

    def __init__(self, processes: Processes, rank: int, world_size: int, env: Mapping[str, str]) -> None:
        self.rank = rank
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.connection, theirs = Pipe()
        environment = {
            MARK: processes.mark,  # what it starts is found by it, wherever that has gone
            "GLOO_SOCKET_IFNAME": "lo",
            # Hosts of their own to NCCL, which refuses to share a GPU within one.
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_HOSTID": f"host {rank}",
            "NCCL_IB_DISABLE": "1",
        }
        arguments = rank, world_size
        self.process = forking.fork(rank, arguments, environment | dict(env), theirs.fileno(), self._log.fileno())
        theirs.close()

    def receive(self) -> tuple[bool, Any]:
        """(True, result) or (False, exception)."""
        try:
            ok, payload, text = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            # Its number stays its own until it is waited for, so the group can be killed safely: children it left.
            self.process.has_ended(None)
            self.kill()
            return False, WorkerDied(self.rank, self.process.wait(), self.output())
        if not ok:
            payload.__cause__ = RemoteTraceback(f"in worker {self.rank}:\n{text}{_quoted(self.output())}")
        return ok, payload

    def output(self, limit: int = 4000) -> str:
        return os.pread(self._log.fileno(), limit, max(0, self._written() - limit)).decode(errors="replace")

    def _written(self) -> int:
        """Bytes. Nobody seeks: it would move where the worker writes, with whom the file's offset is shared."""
        return os.fstat(self._log.fileno()).st_size

    def hung(self) -> str:
        """What a worker that does not answer was doing."""
        before, deadline = self._written(), time.monotonic() + STACKS
        self.process.send_signal(signal.SIGUSR1)  # faulthandler writes the stacks
        while self._written() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # the rest of them
        return f"worker {self.rank} had not finished in time{_quoted(self.output(12000))}"

    def stalled(self) -> WorkerDied:
        self.kill()
        return WorkerDied(self.rank, self.process.wait(), self.output(), stalled=True)

    def kill(self) -> None:
        """With its process group: a worker may have started processes of its own."""
        self.process.end()

    def close(self) -> None:
        self.kill()
        self.connection.close()
        self._log.close()


# ------------------------------------------------------------------------------------------- the worker's side


def _serve(connection: Connection, rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            task, backend, port, prefix, group_timeout = connection.recv()
        except EOFError:
            return
        try:
            fn, args = pickle.loads(task)
            if backend is not None:
                limit = timedelta(seconds=max(group_timeout, SET_UP))
                store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit))
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=group_timeout), dist.group.WORLD)
            _reply(connection, True, fn(rank, world_size, *args))
        except BaseException as error:
            _reply(connection, False, error)
        try:
            if connection.recv() is not None:
                raise RuntimeError("the pool sent a task before this one was over")
        except EOFError:
            return
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
            _reply(connection, True, None)
        except BaseException as error:
            _reply(connection, False, error)


def _reply(connection: Connection, ok: bool, value: Any) -> None:
    text = "" if ok else "".join(traceback.format_exception(value))
    try:
        payload = pickle.dumps((ok, value, text))
        if not ok:
            pickle.loads(payload)  # exceptions with arguments of their own often pickle, and then do not unpickle
    except Exception as error:
        what = f"a result that cannot be pickled ({error})" if ok else f"{type(value).__name__}: {value}"
        payload = pickle.dumps((False, RuntimeError(what), text))
    connection.send_bytes(payload)


def _main() -> None:
    fd, (rank, world_size) = forking.serve(int(sys.argv[1]))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _serve(Connection(fd), rank, world_size)


if __name__ == "__main__":
    _main()


def alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended: for tests of what is left behind."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
