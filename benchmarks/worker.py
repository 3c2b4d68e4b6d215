"""One worker of a benchmark, seen from inside: its rank, its device, and how it agrees with all the others."""

import atexit
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import dear
from dear.launch import detect

from . import records
from .network.ranks import end_at_once

T = TypeVar("T")

# A candidate that hangs must fail here, and long before the group on which the ranks then agree to drop it.
CANDIDATE_TIMEOUT = timedelta(seconds=60)
CONTROL_TIMEOUT = timedelta(minutes=15)


def launched() -> bool:
    """Whether torchrun, mpirun or srun started this process, as one of the ranks of a job."""
    try:
        detect(os.environ)
    except RuntimeError:  # by no launcher, or with variables missing, which joining the job will report
        return "RANK" in os.environ
    return True


# What gloo puts before its messages: where they stand in its source.
_SOURCE_LINE = re.compile(r"\[[^\]\s]*:\d+\] ?")


class Worker:
    """One rank among all. Control messages use the default group; each candidate gets groups of its own.

    backend, device: of the candidates' groups and tensors, such as "nccl" and "cuda". Control messages always go over
    gloo. On "cuda" the ranks of a host take its GPUs in turn; RuntimeError where there is none. Under mpirun, MPI stays
    initialized until the end, so that candidates can use it.

    A collective that fails leaves a gloo group unusable. With one group per candidate, a failure costs that candidate
    and nothing else. One thread per worker: more workers than cores would otherwise measure the scheduler.
    """

    def __init__(self, backend: str = "gloo", device: str = "cpu") -> None:
        torch.set_num_threads(1)
        if launched() and detect(os.environ).launcher == "mpirun":
            with suppress(ImportError, RuntimeError):  # a method that needs MPI will report it
                importlib.import_module("mpi4py.MPI")  # or joining the job would finalize it
        if not dist.is_initialized():
            dear.init_process_group("gloo", timeout=CONTROL_TIMEOUT)
        self.backend, self.device = backend, torch.device(device)
        if self.device.type == "cuda":
            devices = torch.cuda.device_count()
            if not devices:
                raise RuntimeError("torch sees no GPU here: leave out --device cuda")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % devices)
            torch.cuda.set_device(self.device)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.had_failure = False

    def group(self) -> dist.ProcessGroup:
        """A new process group over all ranks, for one candidate."""
        # This rank is in it, which torch 2.15's types leave open.
        made: Any = dist.new_group(timeout=CANDIDATE_TIMEOUT, backend=self.backend)
        return made

    def barrier(self) -> None:
        dist.barrier()

    def synchronize(self) -> None:
        """Waits for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def attempt(self, action: Callable[[], T]) -> tuple[T | None, str | None]:
        """Runs the action on every rank; returns its result, or, on all ranks alike, the failure that came first.

        Every rank must call this together: it is where they agree whether to go on. The first failure in time is the
        cause; later ones are of ranks that waited for the failed one.
        """
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            first_line = (_SOURCE_LINE.sub("", str(error)).strip() or "no message").splitlines()[0]
            failure = time.time(), f"rank {self.rank}: {type(error).__name__}: {first_line}"
        failures = [each for each in self.gather(failure) if each]
        if not failures:
            return result, None
        self.had_failure = True
        return None, min(failures)[1]

    def leave(self) -> None:
        """Parts from the others. After a failure, groups are left as they are, and the process ends without the
        interpreter's clean-up: a broken group may block in its destructor."""
        self.barrier()
        if self.had_failure:
            atexit.register(end_at_once)
        else:
            dist.destroy_process_group()


def user_seconds() -> tuple[float, float] | None:
    """CPU time in user mode since the start, of the whole machine and of this process; None where unknown."""
    try:
        with open("/proc/stat") as table:
            user, nice = table.readline().split()[1:3]
    except OSError:
        return None
    return (int(user) + int(nice)) / os.sysconf("SC_CLK_TCK"), os.times().user


@contextmanager
def accounted() -> Iterator[dict[str, Any]]:
    """What a process by itself measures inside: at the end the dict has the processors that there are, the seconds that
    went by, and the user-mode CPU seconds of the machine and of this process. What is left over, others have taken."""
    found: dict[str, Any] = {}
    user, begun = user_seconds(), time.perf_counter()
    yield found
    wall, after = time.perf_counter() - begun, user_seconds()
    used = [b - a for a, b in zip(user, after, strict=True)] if user and after else None
    found |= {"cpus": records.cpus(), "wall_s": wall, "user_s": used}


def bytes_sent() -> int | None:
    """Bytes that left this network namespace's interfaces since it began, loopback left out; None where unknown.

    Every worker of the emulated network has a namespace of its own, so there this is what one worker sent, with all
    protocol headers; where the workers of a node share one, what they sent together through its port. On a shared
    machine it counts other programs too, and on loopback nothing.
    """
    try:
        with open("/proc/net/dev") as table:
            rows = [line.split(":") for line in table if ":" in line]
    except OSError:
        return None
    return sum(int(counters.split()[8]) for name, counters in rows if name.strip() != "lo")
