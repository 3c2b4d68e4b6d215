"""Ways of reducing a tensor over all ranks, side by side: python -m benchmarks.collectives.

The table has the form that users of nccl-tests know: size, count, type, time, algorithm and bus bandwidth, and wrong
elements, which is a count because the sums are exactly predictable. Methods take turns at every size, so that what
drifts on the machine drifts for all of them.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from benchmarks import collectives_table, results
from benchmarks.command import UNLIMITED, Parser, fail, positive, size, terminal
from benchmarks.crew import Crew, bytes_sent
from benchmarks.launch import Report, WorkersFailed, progress_bar, run_workers, worker
from benchmarks.methods import DTYPES, HALVES, METHODS, Method
from benchmarks.network import AS_LAUNCHED, NetworkError, network_options, open_network

CELL_SECONDS = 3600


@dataclass(frozen=True)
class Plan:
    """What one cell (one rate, one number of workers) measures."""

    methods: list[str]
    sizes: list[int]  # bytes of the whole tensor
    dtype: str = "float"
    iterations: int = 5  # timed, per round
    warmup: int = 1  # per round
    rounds: int = 4


@dataclass
class Contestant:
    """One method at one size, and what was measured of it."""

    name: str
    method: Method | None = None
    failure: str | None = None
    wrong: int = 0
    blocks: list[dict[str, Any]] = field(default_factory=list)


class Measurement:
    """One cell. Every rank makes the same calls in the same order."""

    def __init__(self, crew: Crew, plan: Plan, report: Report) -> None:
        self.crew, self.plan, self.report = crew, plan, report
        self.groups: dict[str, dist.ProcessGroup] = {name: crew.group() for name in plan.methods}
        self.broken: dict[str, str] = {}  # methods that failed, and their groups with them
        self.done, self.total = 0, len(plan.methods) * len(plan.sizes) * (plan.rounds + 1)

    def run(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "workers": self.crew.world,
            "sizes": [self._size(bytes_) for bytes_ in self.plan.sizes],
        }

    def _progress(self, steps: int, doing: str) -> None:
        self.done += steps
        if self.crew.rank == 0:
            self.report(self.done, self.total, doing)

    def _size(self, bytes_: int) -> dict[str, Any]:
        """All methods at one size: one checked run each, then rounds in an order that rotates, then one more check."""
        dtype = DTYPES[self.plan.dtype]
        count = max(bytes_ // dtype.itemsize // self.crew.world, 1) * self.crew.world
        contestants = [Contestant(name, failure=self.broken.get(name)) for name in self.plan.methods]
        for one in contestants:
            self._progress(1, f"{collectives_table.show_size(bytes_)} {one.name}")
            if one.failure is None:
                one.method, one.failure = self.crew.attempt(
                    lambda name=one.name: METHODS[name](count, dtype, self.groups[name])  # type: ignore[misc]
                )
                self._check(one)
        for number in range(self.plan.rounds):
            first = number % len(contestants)
            for one in contestants[first:] + contestants[:first]:
                self._progress(1, f"{collectives_table.show_size(bytes_)} {one.name}")
                self._block(one, number)
        for one in contestants:
            self._check(one)
        methods = [
            {
                "name": one.name,
                "halves": HALVES[one.name],
                "failure": one.failure,
                "wrong": one.wrong,
                "blocks": one.blocks,
            }
            for one in contestants
        ]
        return {"bytes": count * dtype.itemsize, "count": count, "methods": methods}

    def _check(self, one: Contestant) -> None:
        """Adds the wrong elements of one run, all ranks together."""
        method = one.method
        if method is None or one.failure:
            return

        def check() -> int:
            method.reset()
            method.run()
            return method.wrong()

        wrong, failure = self.crew.attempt(check)
        self._note(one, failure)
        if not failure:
            one.wrong += sum(self.crew.gather(wrong or 0))

    def _block(self, one: Contestant, number: int) -> None:
        method = one.method
        if method is None or one.failure:
            return
        self.crew.barrier()
        measured, failure = self.crew.attempt(lambda: self._timed(method))
        self._note(one, failure)
        if not failure:
            ranks = [rank for rank in self.crew.gather(measured) if rank]
            one.blocks.append({"round": number, **{key: [rank[key] for rank in ranks] for key in ranks[0]}})

    def _note(self, one: Contestant, failure: str | None) -> None:
        if failure:
            one.failure = self.broken[one.name] = failure

    def _timed(self, method: Method) -> dict[str, Any]:
        """Back-to-back runs, as in training: no barrier between them, since an exchange synchronises by itself."""
        for _ in range(self.plan.warmup):
            method.run()
        sent, cpu = bytes_sent(), time.process_time()
        times = []
        for _ in range(self.plan.iterations):
            start = time.perf_counter()
            method.run()
            times.append(round((time.perf_counter() - start) * 1e6, 1))
        cpu_ms = (time.process_time() - cpu) * 1e3 / self.plan.iterations
        sent_after = bytes_sent()
        return {
            "us": times,
            "cpu_ms": round(cpu_ms, 3),
            "sent_bytes": None if sent is None else ((sent_after or 0) - sent) // self.plan.iterations,
        }


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.collectives", description="Ways of reducing a tensor, side by side.")
    parser.add_argument("-b", type=size, default=2**20, dest="begin", metavar="SIZE", help="smallest, such as 1M")
    parser.add_argument("-e", type=size, default=2**26, dest="end", metavar="SIZE", help="largest, such as 64M")
    parser.add_argument("-f", type=positive, default=4, dest="factor", help="from one size to the next")
    parser.add_argument("-n", type=positive, default=5, dest="iterations", help="timed runs per round")
    parser.add_argument("-w", type=positive, default=1, dest="warmup", help="untimed runs before them")
    parser.add_argument("--rounds", type=positive, default=4, help="times every method has its turn at a size")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of: {', '.join(METHODS)}")
    network_options(parser)
    parser.add_argument("--json", type=Path, help="where the raw times go, such as benchmarks/results/collectives.json")
    given = parser.parse_args()
    given.methods = [name.strip() for name in given.methods.split(",") if name.strip()]
    unknown = [name for name in given.methods if name not in METHODS]
    if unknown or not given.methods:
        parser.error(f"method {', '.join(unknown) or 'list'!r} is not known: choose from {', '.join(METHODS)}")
    if given.factor < 2 or given.begin > given.end:
        parser.error("-b must not exceed -e and -f must be 2 or more")
    given.sizes = [given.begin]
    while given.sizes[-1] * given.factor <= given.end:
        given.sizes.append(given.sizes[-1] * given.factor)
    return given


def measure(crew: Crew, plan: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Measurement(crew, Plan(**plan), report).run()


def main() -> None:
    given = arguments()
    plan = Plan(given.methods, given.sizes, given.dtype, given.iterations, given.warmup, given.rounds)
    console = terminal()
    payload = results.header("collectives", {"workers": given.workers, "rates": given.rates})
    payload["cells"] = []

    def keep(cell: dict[str, Any], rate: str, network: str) -> None:
        payload["cells"].append({"rate": rate, "network": network, **cell})
        if given.json:
            results.write(given.json, payload)
        collectives_table.show(payload["cells"][-1], console)

    if "RANK" in os.environ:  # started by torchrun: every process is a worker already
        crew = Crew()
        with progress_bar(console if crew.rank == 0 else Console(quiet=True), AS_LAUNCHED) as report:
            cell = Measurement(crew, plan, report).run()
        if crew.rank == 0:
            keep(cell, UNLIMITED, AS_LAUNCHED)
        crew.leave()
        return
    try:
        for workers in given.workers:
            with open_network(given.network, workers) as network:
                console.print(network.description)
                for rate in network.possible(given.rates):
                    network.set_rate(rate)
                    with progress_bar(console, f"{workers} workers, {rate}") as report:
                        cell = run_workers(network.lab, "benchmarks.collectives", plan, report, CELL_SECONDS)
                    keep(cell, rate, network.name)
    except (NetworkError, WorkersFailed) as error:
        fail(str(error))
    if given.json:
        console.print(f"Raw times: {given.json}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), measure)
    else:
        main()
