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
    low-rank, error feedback   read g 4, read e 4, write e 4, whichever factor is made         = 12 and the factors
    low-rank decode            write g 4                                                       = 4 and the factors
    dense in 16 bits           read g 4, write 2; with error feedback read e 4, write e 4     = 6, 14
    average of 16 bits, P      read 2 P, write 2; with error feedback read e 4, write e 4
    dense members, gathered    read g 4, write the message 4; the same when scattered          = 8

A copy of the same number of elements reads 4 and writes 4; the memory also reads the lines that a copy is about to
overwrite, which an update in place needs not, so a kernel can exceed 100% of it. The kernels of a family, plain torch
and the copy take turns in every round, so that a noisy machine is equally noisy to all; the figures are medians over
the rounds.

    python -m benchmarks.compressors --json benchmarks/results/compressors.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import cells, kernels_table, results
from benchmarks.command import Parser, number, positive, terminal
from benchmarks.crew import user_seconds
from benchmarks.kernels import FAMILIES, Case
from benchmarks.launch import Report
from compress import ops


@dataclass(frozen=True)
class Plan:
    """What one cell (one family of kernels) measures."""

    numel: int  # elements of the fusion group
    density: float
    rank: int
    threads: int
    rounds: int


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(cases: list[Case], copy: Callable[[], object], rounds: int, report: Report) -> list[float]:
    """Times all cases in turn, and the copy before each: one list of copies for all."""
    copies = []
    for turn in range(rounds + 1):  # the first round warms up, and is dropped
        report(turn, rounds + 1, f"round {turn} of {rounds}" if turn else "warming up")
        for case in cases:
            copies.append(timed(copy))
            case.prepare()
            case.seconds.append(timed(case.run))
            # Where plain torch is very slow, fewer rounds give as good a median.
            if case.plain is not None and (turn % 3 == 0 or case.plain_seconds[-1] < 0.05):
                case.prepare()
                case.plain_seconds.append(timed(case.plain))
    for case in cases:
        del case.seconds[0], case.plain_seconds[:1]
    return copies[len(cases) :]


def measure_family(family: str, plan: Plan, report: Report) -> dict[str, Any]:
    """One cell."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    grad = torch.randn(plan.numel) * 1e-3
    target = torch.empty_like(grad)
    cases = FAMILIES[family](grad, plan.density, plan.rank)
    user, begun = user_seconds(), time.perf_counter()
    copies = measure(cases, lambda: target.copy_(grad), plan.rounds, report)
    wall, user_after = time.perf_counter() - begun, user_seconds()
    return {
        "plan": asdict(plan),
        "kernel_threads": ops.kernel_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": results.cpus(),
        "wall_s": wall,
        # User-mode CPU seconds meanwhile: the machine's, this process's. What is left over, others have taken.
        "user_s": [b - a for a, b in zip(user, user_after, strict=True)] if user and user_after else None,
        "copy_bytes_per_s": 8 * plan.numel / statistics.median(copies),
        "copy_seconds": copies,
        "kernels": [account(case) for case in cases],
    }


def account(case: Case) -> dict[str, Any]:
    """What is kept of one kernel."""
    return {
        "name": case.name,
        "bytes": case.bytes,
        "median_s": statistics.median(case.seconds),
        "plain_median_s": statistics.median(case.plain_seconds) if case.plain_seconds else None,
        "best_s": min(case.seconds),
        "plain_best_s": min(case.plain_seconds, default=None),
        "seconds": case.seconds,
        "plain_seconds": case.plain_seconds,
    }


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.compressors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=positive, default=1 << 24, help="elements of the fusion group")
    parser.add_argument("--density", type=number, default=0.01, help="share of the elements that top-k sends")
    parser.add_argument("--rank", type=positive, default=4, help="rank of the low-rank factors")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=15)
    cells.file_options(parser)
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), terminal()
    plan = Plan(given.numel, given.density, given.rank, given.threads, given.rounds)
    with cells.ended_by_a_sentence(given.json):
        kept = cells.Kept.open(results.header("compressors", asdict(plan)), given.json, given.resume)
        for index, family in enumerate(FAMILIES, 1):
            title = f"cell {index} of {len(FAMILIES)}: {family}"
            cells.obtain(kept, {"family": family}, plan, title, partial(measure_family, family, plan), console)
    kernels_table.show(kept.payload, console)


if __name__ == "__main__":
    main()
