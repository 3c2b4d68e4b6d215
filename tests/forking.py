"""Processes that begin with everything imported: forks of one that has imported it, and does nothing else.

Importing torch and what a first training step imports takes seconds of a processor, a fork milliseconds. The process
that is forked has one thread and no state of a test, so a fork is as good as a fresh process. Two of them take turns,
since forks of one have the same hash seed and the same addresses: ranks that agree only because their sets have one
order must be found out.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.processes import Processes, python_path

#: What workers import sooner or later. Not all of it need be there.
IMPORTED = ("torch._dynamo", "torch.distributed", "dear", "compress", "precondition", "pytest", "hypothesis.strategies")
_templates: list[_Template] = []


class Fork:
    """One forked process, as subprocess.Popen shows those that it starts."""

    def __init__(self, template: _Template, pid: int) -> None:
        self._template, self.pid = template, pid
        self.returncode: int | None = None
        self._exit = os.pidfd_open(pid)

    def has_ended(self, timeout: float | None = 0.0) -> bool:
        """Whether it ends within so many seconds. Its number stays its own until `poll` or `wait` has seen that."""
        return bool(select.select([self._exit], [], [], timeout)[0])

    def poll(self) -> int | None:
        """How it has ended; None while it runs."""
        if self.returncode is None and self.has_ended():
            self.returncode = self._template.ask("reap", self.pid)
            os.close(self._exit)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As poll, when it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not self.has_ended(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        found = self.poll()
        assert found is not None
        return found

    def send_signal(self, number: int) -> None:
        """Nothing is sent to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kills it, if it still runs, with its process group."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has yet to become the leader of one
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class _Template:
    """The process that is forked, and the way to ask it. It ends with this one, and its forks with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here = os.path.dirname(os.path.abspath(__file__))
        environment = {
            "PYTHONPATH": os.pathsep.join([here, python_path()["PYTHONPATH"]]),
            "OMP_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whoever asks for a GPU does not start CUDA, which no fork survives
        }
        self._socket = ours
        self._processes = Processes()
        self._processes.start(
            [sys.executable, "-m", "workers", str(theirs.fileno())],
            environment,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def ask(self, *request: Any, fds: tuple[int, ...] = ()) -> Any:
        """The answer to a request."""
        socket.send_fds(self._socket, [pickle.dumps(request)], fds)
        answer = self._socket.recv(1 << 16)
        if not answer:
            raise RuntimeError("the process of which workers are forks has ended")
        return pickle.loads(answer)


def fork(rank: int, arguments: tuple[Any, ...], env: Mapping[str, str], connection: int, log: int) -> Fork:
    """A new process, in a session of its own, that serves as workers.py says.

    arguments: the worker's, behind its connection. env: added to its environment. connection, log: descriptors; what it
    prints goes to the log.
    """
    while len(_templates) < 2:
        _templates.append(_Template())
    template = _templates[rank % 2]
    return Fork(template, template.ask("fork", arguments, dict(env), fds=(connection, log)))


def serve(descriptor: int) -> tuple[int, tuple[Any, ...]]:
    """The other end: imports everything, then forks whenever it is asked to. Returns in a fork alone: its connection,
    and its arguments."""
    asked = socket.socket(fileno=descriptor)
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what forks share stays shared
    while True:
        data, fds, _, _ = socket.recv_fds(asked, 1 << 16, 2)
        if not data:  # who asks has ended
            os._exit(0)
        what, *rest = pickle.loads(data)
        if what == "reap":
            answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                asked.close()
                return _become_a_worker(*rest, *fds)
        for fd in fds:
            os.close(fd)
        asked.send(pickle.dumps(answer))


def _become_a_worker(
    arguments: tuple[Any, ...], env: dict[str, str], connection: int, log: int
) -> tuple[int, tuple[Any, ...]]:
    os.setsid()
    os.environ.update(env)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    return connection, arguments
