"""The processes of one lab: started as ranks of a job, watched together, and ended together."""

from __future__ import annotations

import importlib
import os
import pickle
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import reaper

# Once a rank has failed, the others get this long (seconds) to fail by themselves before they are killed: what they
# say about it is worth having.
GRACE = 3.0


@dataclass(frozen=True)
class Result:
    """How one rank ended. `returncode` is negative for a signal; the texts are empty if they were passed through."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


class RankFailed(RuntimeError):
    """A rank ended with something other than 0. `results` holds how every rank ended."""

    def __init__(self, failed: Result, results: list[Result]) -> None:
        super().__init__(f"rank {failed.rank} failed with exit code {failed.returncode}{_tail(failed.stderr)}")
        self.rank, self.returncode, self.stderr, self.results = failed.rank, failed.returncode, failed.stderr, results


class RanksTimedOut(TimeoutError):
    """Some ranks had not finished in time, and were killed."""


def _tail(stderr: str, lines: int = 25) -> str:
    last = stderr.rstrip().splitlines()[-lines:]
    return "; the end of its standard error:\n" + "\n".join(last) if last else ""


class Ranks:
    """Starts processes that belong together. A lab says where each one lives.

    Whatever they start in turn carries the lab's mark in its environment, and is ended with the lab; should this
    process be killed, by a reaper that waits for just that.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"a lab of {workers} workers is out of range: give at least 1")
        self.workers = workers
        self._mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._children: list[_Child] = []
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__, self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # or Ctrl-C, or a kill of our group, would end it with us
        )
        self.port = self._free_port()

    # What a lab fills in.

    def place(self, rank: int) -> AbstractContextManager[None]:
        """Processes started inside it live where this rank lives."""
        raise NotImplementedError

    def address(self, rank: int) -> str:
        raise NotImplementedError

    def interface(self) -> str:
        raise NotImplementedError

    # What a lab gives.

    def environment(self, rank: int) -> dict[str, str]:
        """What tells a process that it is this rank."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.workers),
            "LOCAL_WORLD_SIZE": str(self.workers),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(self.port),
            "GLOO_SOCKET_IFNAME": self.interface(),
            "NCCL_SOCKET_IFNAME": self.interface(),
            "NCCL_HOSTID": f"host {rank}",  # or NCCL goes through this machine's memory, and refuses to share a GPU
            "NCCL_IB_DISABLE": "1",
            reaper.MARK: self._mark,
        }

    def spawn(
        self,
        rank: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        capture: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Starts one process as `rank`; it is the leader of a session of its own, and ends with the lab at the latest.

        env: added to this process's environment. capture: standard output and error become pipes of the result.
        Raises FileNotFoundError if there is no such program.
        """
        pipe = subprocess.PIPE if capture else None
        environment = os.environ | dict(env or {}) | self.environment(rank)
        if shutil.which(argv[0], path=environment.get("PATH")) is None:
            raise FileNotFoundError(f"there is no program {argv[0]!r} to run as a worker: check its name and PATH")
        with self.place(rank):
            process = subprocess.Popen(
                list(argv),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
        self._children.append(_Child(rank, process))
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        capture: bool = True,
        check: bool = True,
        on_line: Callable[[int, str], None] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> list[Result]:
        """Runs a command as every rank, or only as those in `ranks`, and returns how each ended.

        timeout: seconds for all of it. capture: False passes their output through. on_line: called with (rank, line)
        for every line of a rank's standard output, as it comes. check: a rank that fails ends the run, the others
        being killed shortly after; False waits for all of them, and leaves return codes to the caller. ranks: for a
        launcher, which starts the others by itself; if it fails, whatever else runs in the lab is ended with it.

        Raises RankFailed, RanksTimedOut.
        """
        self.port = self._free_port()
        started = len(self._children)
        clean = False
        try:
            for rank in range(self.workers) if ranks is None else ranks:
                self.spawn(rank, argv, env, capture=capture)
            failed = self._watch(self._children[started:], timeout, check, on_line)
            clean = failed is None
        finally:
            children = self._children[started:]
            del self._children[started:]
            for child in children:
                child.end()
            if ranks is not None and not clean:
                reaper.end_all(self._mark)
        results = [child.result() for child in children]
        if failed is not None:
            raise RankFailed(next(result for result in results if result.rank == failed), results)
        return results

    def call(
        self,
        fn: Callable[..., Any],
        *args: Any,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        on_line: Callable[[int, str], None] | None = None,
    ) -> list[Any]:
        """Runs `fn(rank, world_size, *args)` in a fresh Python process as every rank; returns the results by rank.

        `fn` must stand at the top of a module, since it travels by name; arguments and results are pickled.
        Raises as `run`.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "task").write_bytes(pickle.dumps((_module_of(fn), fn.__qualname__, args)))
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self.run(
                [sys.executable, "-m", "benchmarks.ranks", folder],
                env=dict(env or {}) | {"PYTHONPATH": paths},
                timeout=timeout,
                on_line=on_line,
            )
            return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(self.workers)]

    def close(self) -> None:
        """Ends whatever still runs. Harmless when repeated."""
        for child in self._children:
            child.end()
        self._children.clear()
        if self._reaper.poll() is None:
            reaper.end_all(self._mark)
            self._reaper.communicate()  # closes its input, upon which it looks again and exits

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_port(self) -> int:
        with self.place(0), socket.socket() as probe:
            probe.bind((self.address(0), 0))
            return int(probe.getsockname()[1])

    def _watch(
        self,
        children: list[_Child],
        timeout: float | None,
        check: bool,
        on_line: Callable[[int, str], None] | None,
    ) -> int | None:
        """Collects output until all have ended; returns the rank that failed first, if that matters."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failed: int | None = None
        running = {child.rank for child in children}
        with selectors.DefaultSelector() as selector:
            for child in children:
                selector.register(child.exit_fd, selectors.EVENT_READ, child)
                for stream in child.streams:
                    selector.register(stream, selectors.EVENT_READ, child)
            while running:
                ready = selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    child = key.data
                    if key.fd != child.exit_fd:
                        if not child.read(key.fd, on_line):
                            selector.unregister(key.fd)
                        continue
                    selector.unregister(key.fd)
                    child.end()
                    running.discard(child.rank)
                    if check and failed is None and child.process.returncode:
                        failed = child.rank
                        grace = time.monotonic() + GRACE
                        deadline = grace if deadline is None else min(deadline, grace)
                if running and deadline is not None and time.monotonic() >= deadline:
                    if failed is None:
                        stuck = sorted(running)
                        tails = "".join(f"\nrank {c.rank}{_tail(c.text(2))}" for c in children if c.rank in running)
                        raise RanksTimedOut(f"ranks {stuck} had not finished after {timeout:g} seconds{tails}")
                    break
            for child in children:  # the grace is over, or all have ended: what is left in the pipes
                child.end()
                for fd in list(child.streams):
                    while child.read(fd, on_line):
                        pass
        return failed


class _Child:
    """One process, what it has written, and a descriptor that becomes readable when it exits."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.process = rank, process
        self.exit_fd = os.pidfd_open(process.pid)
        self.streams: dict[int, int] = {}  # descriptor to 1 or 2
        self._written = {1: bytearray(), 2: bytearray()}
        self._partial = b""
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self.streams[stream.fileno()] = number

    def read(self, fd: int, on_line: Callable[[int, str], None] | None) -> bool:
        """Takes what there is; False if there is no more."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        number = self.streams[fd]
        self._written[number] += data
        if on_line is not None and number == 1:
            *lines, self._partial = (self._partial + data).split(b"\n")
            if not data and self._partial:
                lines.append(self._partial)
                self._partial = b""
            for line in lines:
                on_line(self.rank, line.decode(errors="replace"))
        return bool(data)

    def text(self, number: int) -> str:
        return self._written[number].decode(errors="replace")

    def result(self) -> Result:
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return Result(self.rank, self.process.returncode, self.text(1), self.text(2))

    def end(self) -> None:
        """Kills it, if it still runs, with its process group; what it left in the group, if it does not."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):  # until it is waited for, the number is its own, and the group's
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.exit_fd >= 0:
            os.close(self.exit_fd)
        self.exit_fd = -1


def _module_of(fn: Callable[..., Any]) -> str:
    name = fn.__module__
    if name == "__main__":
        spec = sys.modules["__main__"].__spec__
        name = spec.name if spec is not None else ""
    if not name or "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} cannot run as a rank: put it at the top level of a module")
    return name


def _serve(folder: str) -> None:
    """The other end of `Ranks.call`."""
    module, name, args = pickle.loads((Path(folder) / "task").read_bytes())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    result = getattr(importlib.import_module(module), name)(rank, world_size, *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _serve(sys.argv[1])
