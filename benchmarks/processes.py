"""The one way to start processes and to end them: nothing that was started is left behind, however its owner ends.

    with Processes() as processes:
        child = processes.start(["sleep", "1000"])

Each process leads a session of its own and carries a mark in its environment. Whatever it starts inherits the mark, so
shells, launchers and daemons are found too, with no rights beyond those of the user. A reaper waits until the owner has
ended, also by `kill -9`, and then ends every process with the mark. This file, run as a program, is that reaper.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "DEAR_LAB"
# Once a process has failed, the others get this long (seconds) to fail by themselves before they are killed: what they
# say about it is worth having.
GRACE = 3.0

OnLine = Callable[[int, str], None]  # rank, one line of its standard output


class TimedOut(TimeoutError):
    """Some processes had not finished in time, and were killed."""


def marked(value: str) -> list[int]:
    """The processes whose environment holds MARK=value, zombies excepted (they have none)."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # gone, or another user's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_all(value: str) -> None:
    """Kills them until two looks in a row find none: a process being started takes the mark only when it runs."""
    quiet = 0
    while quiet < 2:
        pids = marked(value)
        quiet = 0 if pids else quiet + 1
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def python_path() -> dict[str, str]:
    """The environment by which another Python finds the modules that this one finds."""
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def tail(text: str, lines: int = 25) -> str:
    """The end of what a process wrote to standard error, for a message; empty if it wrote nothing."""
    last = text.rstrip().splitlines()[-lines:]
    return "; the end of its standard error:\n" + "\n".join(last) if last else ""


class Child:
    """One process, what it has written, and a descriptor that becomes readable when it exits."""

    def __init__(self, rank: int, process: subprocess.Popen[Any]) -> None:
        self.rank, self.process = rank, process
        self.exit_fd = os.pidfd_open(process.pid)
        self.streams: dict[int, int] = {}  # descriptor to 1 or 2, while it is watched
        self._written = {1: bytearray(), 2: bytearray()}
        self._partial = b""

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Registers its end and its pipes."""
        selector.register(self.exit_fd, selectors.EVENT_READ, self)
        for number, stream in ((1, self.process.stdout), (2, self.process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self.streams[stream.fileno()] = number
                selector.register(stream, selectors.EVENT_READ, self)

    def read(self, fd: int, on_line: OnLine | None) -> bool:
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
                lines, self._partial = [self._partial], b""
            for line in lines:
                on_line(self.rank, line.decode(errors="replace"))
        return bool(data)

    @property
    def returncode(self) -> int:
        """Once it has ended; negative for a signal."""
        return int(self.process.returncode)

    @property
    def stdout(self) -> str:
        """What it has written; empty if that was passed through."""
        return self._written[1].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._written[2].decode(errors="replace")

    def end(self) -> None:
        """Kills it, if it still runs, with its process group."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):  # until it is waited for, the number is its own, and the group's
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.exit_fd >= 0:
            os.close(self.exit_fd)
        self.exit_fd = -1


class Processes:
    """Processes that belong together, ended by `close` or, should this process be killed, by a reaper."""

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._children: list[Child] = []
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, self.mark],
            # Without the mark of the process that started us: ending us by that mark must not end the reaper.
            env={name: value for name, value in os.environ.items() if name != MARK},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # or Ctrl-C, or a kill of our group, would end it with us
        )

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, rank: int = 0, **options: Any) -> Child:
        """Starts one process; it leads a session of its own.

        env: added to this process's environment. options: subprocess.Popen's.
        Raises FileNotFoundError if there is no such program.
        """
        environment = os.environ | dict(env or {}) | {MARK: self.mark}
        if shutil.which(argv[0], path=environment.get("PATH")) is None:
            raise FileNotFoundError(f"there is no program {argv[0]!r} to run as a worker: check its name and PATH")
        process = subprocess.Popen(
            list(argv), env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )
        child = Child(rank, process)
        self._children.append(child)
        return child

    def wait(
        self, children: Sequence[Child], timeout: float | None, check: bool = True, on_line: OnLine | None = None
    ) -> Child | None:
        """Collects output until all have ended; returns the one that failed first, if that matters.

        check: one that fails ends the others, shortly after. Raises TimedOut.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        failed: Child | None = None
        running = list(children)
        with selectors.DefaultSelector() as selector:
            for child in children:
                child.watch(selector)
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
                    running.remove(child)
                    if check and failed is None and child.process.returncode:
                        failed = child
                        deadline = min(deadline or float("inf"), time.monotonic() + GRACE)
                if running and deadline is not None and time.monotonic() >= deadline:
                    if failed is None:
                        stuck = sorted(child.rank for child in running)
                        tails = "".join(f"\nrank {child.rank}{tail(child.stderr)}" for child in running)
                        raise TimedOut(f"ranks {stuck} had not finished after {timeout:g} seconds{tails}")
                    break
            for child in children:  # the grace is over, or all have ended: what is left in the pipes
                child.end()
                for fd in child.streams:
                    while child.read(fd, on_line):
                        pass
        return failed

    def forget(self, children: Sequence[Child]) -> None:
        """Ends these, and closes their pipes."""
        for child in children:
            child.end()
            for stream in (child.process.stdout, child.process.stderr):
                if stream is not None:
                    stream.close()
        self._children = [child for child in self._children if child not in children]

    def close(self) -> None:
        """Ends whatever still runs. Harmless when repeated."""
        self.forget(self._children)
        if self._reaper.poll() is None:
            end_all(self.mark)
            self._reaper.communicate()  # closes its input, upon which it looks again and exits

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reap() -> None:
    """Waits for standard input to end, which happens when the owner exits in whatever way; then ends what it left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(sys.argv[1])


if __name__ == "__main__":
    reap()
