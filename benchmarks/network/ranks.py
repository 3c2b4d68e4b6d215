"""The processes of one lab, as the ranks of a job: told who they are, watched together, and ended together."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dear._ports import free_port

from ..processes import Child, OnLine, Processes, end_all, python_path, tail

# How else than one by one the ranks are started: from what each is to run, the one command that starts them all, and
# what to add to its environment.
Launch = Callable[[Sequence[str]], AbstractContextManager[tuple[Sequence[str], Mapping[str, str]]]]


class RankFailed(RuntimeError):
    """A rank ended with something other than 0. `results` holds how every rank ended."""

    def __init__(self, failed: Child, results: list[Child]) -> None:
        super().__init__(f"rank {failed.rank} failed with exit code {failed.returncode}{tail(failed.stderr)}")
        self.returncode, self.results = failed.returncode, results


class Ranks(Processes):
    """Starts processes as the ranks of a job. A lab says where each one lives."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"a lab of {workers} workers is out of range: give at least 1")
        super().__init__()
        self.workers = workers
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
        }

    def spawn(self, rank: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Child:
        """As `start`, where this rank lives, in its environment."""
        with self.place(rank):
            return self.start(argv, dict(env or {}) | self.environment(rank), rank, **options)

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        capture: bool = True,
        check: bool = True,
        on_line: OnLine | None = None,
        ranks: Sequence[int] | None = None,
    ) -> list[Child]:
        """Runs a command as every rank, or only as those in `ranks`, and returns how each ended.

        timeout: seconds for all of it. capture: False passes their output through. on_line: called with (rank, line)
        for every line of a rank's standard output, as it comes. check: a rank that fails ends the run, the others
        being killed shortly after; False waits for all of them, and leaves return codes to the caller. ranks: for a
        launcher, which starts the others by itself; if it fails, whatever else runs in the lab is ended with it.

        Raises RankFailed, TimedOut.
        """
        self.port = self._free_port()
        pipe = subprocess.PIPE if capture else None
        children: list[Child] = []
        clean = False
        try:
            for rank in range(self.workers) if ranks is None else ranks:
                children.append(self.spawn(rank, argv, env, stdout=pipe, stderr=pipe))
            failed = self.wait(children, timeout, check, on_line)
            clean = failed is None
        finally:
            self.forget(children)
            if ranks is not None and not clean:
                end_all(self.mark)
        if failed is not None:
            raise RankFailed(failed, children)
        return children

    def call(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        on_line: OnLine | None = None,
        launch: Launch | None = None,
    ) -> list[Any]:
        """Runs `fn(rank, world_size, *args)` in a fresh Python process as every rank; returns the results by rank.

        `fn` must stand at the top of a module, since it travels by name; arguments and results are pickled, and go
        through files, which take nothing from the link. launch: starts the ranks by another launcher, such as mpirun.
        Raises as `run`.
        """
        with tempfile.TemporaryDirectory(prefix="dear-lab-") as folder:
            (Path(folder) / "task").write_bytes(pickle.dumps((name_of(fn), self.workers, args)))
            command = [sys.executable, "-m", __name__, folder]
            with nullcontext((command, {})) if launch is None else launch(command) as (argv, env):
                ranks = None if launch is None else [0]
                self.run(argv, env={**env, **python_path()}, timeout=timeout, on_line=on_line, ranks=ranks)
            return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(self.workers)]

    def _free_port(self) -> int:
        with self.place(0):
            return free_port(self.address(0))


def name_of(fn: Callable[..., Any]) -> str:
    """module:function, by which another process finds it. Raises ValueError where none can."""
    module = fn.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        module = spec.name if spec is not None else ""
    if not module or "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} cannot run as a rank: put it at the top level of a module")
    return f"{module}:{fn.__qualname__}"


def named(name: str) -> Callable[..., Any]:
    """The function of that name."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _serve(folder: Path) -> None:
    """The other end of `Ranks.call`."""
    name, world_size, args = pickle.loads((folder / "task").read_bytes())
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
    else:  # another launcher started it
        from dear.launch import detect

        rank = detect(os.environ).rank
    result = named(name)(rank, world_size, *args)
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    end_at_once()


def end_at_once() -> None:
    """Ends the process with what it has said, but without the interpreter's clean-up.

    DDP keeps the default group, and with it gloo's threads: one that, on a busy machine, has yet to drop a tensor when
    the interpreter ends takes the process down ("terminate called without an active exception").
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # or mpirun takes the end for a crash
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
