"""Every compression kernel: median time, bandwidth, and its share of the machine's copy bandwidth, beside plain torch.

The floor of a kernel is the bytes it must move: each input read once, each output written once, whatever it must keep
nowhere else. Per element, with float32 gradients g and error feedback e, one bit sent, density d:

    sign with error feedback   read g 4, read e 4, write e 4, write bits 1/8                    = 12.13 bytes
    top-k by threshold         read g 4, read e 4, write e 4, write d entries of 8              = 12 + 8 d
    exact threshold            read g 4 and e 4, once for each of three digits                  = 24
    sign decode                read bits 1/8, write g 4                                         = 4.13
    majority vote, P voters    read P/8, write 1/8
    average, P voters          read P/8 and e 4, write e 4 and 1/8
    top-k decode               read d entries of 8, write g 4
    kept threshold             read g 4 and e 4 of the sample
    low-rank, error feedback   read g 4, read e 4, write e 4, whichever factor is made         = 12 and the factors;
                               also where the last step's factors are taken out of e on the way
    low-rank decode            write g 4                                                       = 4 and the factors
    ACP-SGD step               encoding and decoding                                           = 16 and the factors
    dense in 16 bits           read g 4, write 2; with error feedback read e 4, write e 4     = 6, 14
    dense in 8 bits            the same with 1.008 instead of 2, the scales among it            = 5.01, 13.01
    average of 16 bits, P      read 2 P, write 2; with error feedback read e 4, write e 4
    dense members, gathered    read g 4, write the message 4; the same when scattered          = 8

A copy of the same number of elements reads 4 and writes 4; the memory also reads the lines that a copy is about to
overwrite, which an update in place needs not, so a kernel can exceed 100% of it. The kernels of a family, plain torch
and the copy run one after another in every round, so that a noisy machine is equally noisy to all; the figures are
medians over the rounds.

On a GPU a sample is one call in each of several input sets, between two CUDA events. The sets together exceed the L2
cache CACHES times over, so that what a call reads has left the cache since the set's last call, and what it writes
pushes out what the call before it wrote. The host launches a sample while the GPU waits (HEAD_START_CYCLES), or the
time of small kernels would be that of launching them. Two kernels move less, and find some of it in the cache:
orthogonalising, and the merge of sparse lists.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from compress import ops

from ..progress import Report
from ..worker import accounted
from .case import Case
from .cases import FAMILIES

Call = Callable[[], object]
Clock = Callable[[Sequence[Call]], float]  # seconds of one of the calls, which are timed together

CACHES = 2  # how many times the L2 cache the input sets of one kernel fill at least, where MOST_SETS suffice
SMALLEST_BYTES = 0.5  # what the smallest kernel moves per element of the group: a threshold of a sample of 1/16
MOST_SETS = 16  # bounds the memory and the time of small groups
HEAD_START_CYCLES = 4_000_000  # of the GPU, about 2 ms


@dataclass(frozen=True)
class Experiment:
    """What one cell (one family of kernels) measures."""

    numel: int  # elements of the fusion group
    density: float
    rank: int
    threads: int
    rounds: int
    device: str  # "cpu" or "cuda"


def timed(calls: Sequence[Call]) -> float:
    """The clock of the CPU."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def timed_on_gpu(calls: Sequence[Call]) -> float:
    """The clock of the current GPU: from when it begins with the first call to when it has finished the last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)  # private, but what torch's own tests keep a stream busy with
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(calls)


def sets_needed(numel: int, cache: int) -> int:
    """How many input sets of a group of that many elements keep a cache of so many bytes from serving them."""
    return min(MOST_SETS, max(2, math.ceil(CACHES * cache / (SMALLEST_BYTES * numel))))


def measure(
    sets: Sequence[list[Case]], copies: Sequence[Call], clock: Clock, rounds: int, report: Report
) -> list[float]:
    """Times all cases one after another, and the copy before each: one list of copies for all.

    sets: the same cases in each input set; the times are kept in those of the first. copies: one of each set.
    """
    copy_seconds, cases = [], sets[0]
    for number in range(rounds + 1):  # the first round warms up, and is dropped
        report(number, rounds + 1, f"round {number} of {rounds}" if number else "warming up")
        for same in zip(*sets, strict=True):
            case = same[0]
            copy_seconds.append(clock(copies))
            if "kernel" not in case.failures:
                case.seconds += sample(same, "kernel", [one.run for one in same], clock)
            # Where plain torch is very slow, fewer rounds give as good a median, and a cache helps it little.
            last = case.plain_seconds[-1] if case.plain_seconds else 0.0
            if case.plain is not None and "plain torch" not in case.failures and (number % 3 == 0 or last < 0.05):
                some = same if last < 0.005 else same[:1]
                case.plain_seconds += sample(some, "plain torch", [one.plain for one in some if one.plain], clock)
    for case in cases:
        del case.seconds[:1], case.plain_seconds[:1]
    return copy_seconds[len(cases) :]


def sample(same: Sequence[Case], way: str, calls: Sequence[Call], clock: Clock) -> list[float]:
    """The time of a call; nothing where it fails, and from then on the case says why."""
    try:
        for one in same:
            one.prepare()
        return [clock(calls)]
    except RuntimeError as error:  # also of what torch has no kernel for, or no memory
        same[0].failures[way] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return []


def measure_family(family: str, experiment: Experiment, report: Report) -> dict[str, Any]:
    """One cell."""
    torch.set_num_threads(experiment.threads)
    torch.manual_seed(0)
    on_gpu = experiment.device == "cuda"
    count = sets_needed(experiment.numel, torch.cuda.get_device_properties().L2_cache_size) if on_gpu else 1
    sets: list[list[Case]] = []
    copies: list[Call] = []
    with torch.device(experiment.device):
        for _ in range(count):
            grad = torch.randn(experiment.numel) * 1e-3
            copies.append(partial(torch.empty_like(grad).copy_, grad))
            sets.append(FAMILIES[family](grad, experiment.density, experiment.rank))
    with accounted() as others:
        copy_seconds = measure(sets, copies, timed_on_gpu if on_gpu else timed, experiment.rounds, report)
    return {
        "plan": asdict(experiment),
        "input_sets": count,
        "kernel_threads": ops.kernel_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **others,
        "copy_bytes_per_s": 8 * experiment.numel / statistics.median(copy_seconds),
        "copy_seconds": copy_seconds,
        "kernels": [account(case) for case in sets[0]],
    }


def account(case: Case) -> dict[str, Any]:
    """What is kept of one kernel."""
    return {
        "name": case.name,
        "rival": case.rival,
        "bytes": case.bytes,
        "median_s": statistics.median(case.seconds) if case.seconds else None,
        "plain_median_s": statistics.median(case.plain_seconds) if case.plain_seconds else None,
        "best_s": min(case.seconds, default=None),
        "plain_best_s": min(case.plain_seconds, default=None),
        "seconds": case.seconds,
        "plain_seconds": case.plain_seconds,
        "failures": case.failures,
    }
