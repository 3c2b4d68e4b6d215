"""What is measured, inside a worker: at every size all methods run in rounds, out of place and in place."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from dear import cost_model

from .. import records
from ..command import show_size
from ..progress import Report
from ..stats import slowest_rank
from ..worker import Worker, bytes_sent
from .compressed import COMPRESSORS
from .exact import DTYPES, EXACT, Method, Place, Placement
from .mpi_methods import MPI_METHODS

METHODS: dict[str, type[Method]] = {one.name: one for one in [*EXACT, *MPI_METHODS, *COMPRESSORS]}


@dataclass(frozen=True)
class Experiment:
    """What one cell (one rate, one number of workers, one way of starting them) measures."""

    methods: list[str]
    sizes: list[int]  # bytes of the whole tensor
    dtype: str = "float"
    iterations: int = 5  # timed, per round
    warmup: int = 1  # per round
    rounds: int = 4
    backend: str = "gloo"
    device: str = "cpu"
    mpi: str = ""  # "Open MPI 5.0.11": which one starts the workers; none where it is empty
    excluded: dict[str, str] = field(default_factory=dict)  # method: why it is not run


@dataclass
class Candidate:
    """One method in one placement at one size, and what was measured of it."""

    name: str
    placement: Placement
    method: Method | None = None
    failure: str | None = None
    wrong: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, Placement]:
        return self.name, self.placement

    @property
    def running(self) -> Method | None:
        return None if self.failure else self.method

    def account(self) -> dict[str, Any]:
        return {"failure": self.failure, "wrong": self.wrong, "blocks": self.blocks}


class Measurement:
    """One cell. Every rank makes the same calls in the same order."""

    def __init__(
        self, worker: Worker, experiment: Experiment, methods: Mapping[str, type[Method]], report: Report
    ) -> None:
        self.worker, self.experiment, self.methods, self.report = worker, experiment, methods, report
        self.groups: dict[tuple[str, Placement], dist.ProcessGroup] = {}
        self.broken: dict[tuple[str, Placement], str] = {}  # what failed, and its group with it
        self.keys = [(name, place) for name in experiment.methods for place in self._placements(name)]
        self.done, self.total = 0, len(self.keys) * len(experiment.sizes) * (experiment.rounds + 1)

    def run(self) -> dict[str, Any]:
        """The cell: every method's blocks at every size, and a fit of each method's time over the sizes."""
        sizes = [self._size(bytes_) for bytes_ in self.experiment.sizes]
        return {"plan": asdict(self.experiment), "workers": self.worker.world, "sizes": sizes, "fits": fits(sizes)}

    def _placements(self, name: str) -> tuple[Placement, ...]:
        return self.methods[name].placements if name in self.methods else ("in_place",)

    def _progress(self, steps: int, doing: str) -> None:
        self.done += steps
        if self.worker.rank == 0:
            self.report(self.done, self.total, doing)

    def _size(self, bytes_: int) -> dict[str, Any]:
        """All methods at one size: one checked run each, then rounds in an order that rotates, then one more check."""
        dtype = DTYPES[self.experiment.dtype]
        count = max(bytes_ // dtype.itemsize // self.worker.world, 1) * self.worker.world
        place = Place(count, dtype, self.worker)
        candidates = [Candidate(*key, failure=self._known_failure(key)) for key in self.keys]
        for one in candidates:
            self._progress(1, f"{show_size(bytes_)} {one.name}")
            if one.failure is None:
                self._build(one, place)
                self._check(one)
        for number in range(self.experiment.rounds):
            first = number % len(candidates)
            for one in candidates[first:] + candidates[:first]:
                self._progress(1, f"{show_size(bytes_)} {one.name}")
                self._block(one, number)
        for one in candidates:
            self._progress(0, f"{show_size(bytes_)} {one.name}")
            self._check(one)
        return {"bytes": count * dtype.itemsize, "count": count, "methods": self._accounts(candidates)}

    def _known_failure(self, key: tuple[str, Placement]) -> str | None:
        return self.experiment.excluded.get(key[0]) or self.broken.get(key)

    def _accounts(self, candidates: list[Candidate]) -> list[dict[str, Any]]:
        """By method: its in-place account, to which the out-of-place one is added."""
        accounts = []
        for one in candidates:
            if one.placement != "in_place":
                continue
            method = self.methods.get(one.name)
            other = [two.account() for two in candidates if two.key == (one.name, "out_of_place")]
            accounts.append(
                {
                    "name": one.name,
                    "halves": method.halves if method else 2,
                    "lossy": bool(method and method.lossy),
                    **one.account(),
                    **one.facts,
                    **({"out_of_place": other[0]} if other else {}),
                }
            )
        return accounts

    def _build(self, one: Candidate, place: Place) -> None:
        """Makes the method, and asks it what there is to know of it."""

        def build() -> Method:
            if one.key not in self.groups:
                self.groups[one.key] = self.worker.group()
            return self.methods[one.name](place, self.groups[one.key], one.placement)

        one.method, one.failure = self.worker.attempt(build)  # what cannot be had at this size may well be at the next
        method = one.running
        if method is not None:
            facts, failure = self.worker.attempt(method.facts)
            self._note(one, failure)
            one.facts = facts or {}

    def _check(self, one: Candidate) -> None:
        """Adds the wrong elements of one run, all ranks together."""
        method = one.running
        if method is None:
            return

        def check() -> int:
            method.reset()
            method.run()
            self.worker.synchronize()
            return method.wrong()

        wrong, failure = self.worker.attempt(check)
        self._note(one, failure)
        if not failure:
            one.wrong += sum(self.worker.gather(wrong or 0))

    def _block(self, one: Candidate, number: int) -> None:
        method = one.running
        if method is None:
            return
        self.worker.barrier()
        measured, failure = self.worker.attempt(lambda: self._timed(method))
        self._note(one, failure)
        if not failure:
            ranks = [rank for rank in self.worker.gather(measured) if rank]
            one.blocks.append({"round": number, **{key: [rank[key] for rank in ranks] for key in ranks[0]}})

    def _note(self, one: Candidate, failure: str | None) -> None:
        if failure:
            one.failure = self.broken[one.key] = failure

    def _timed(self, method: Method) -> dict[str, Any]:
        """Back-to-back runs, as in training: no barrier between them, since an exchange synchronises by itself."""
        for _ in range(self.experiment.warmup):
            method.prepare()
            method.run()
        method.parts()
        self.worker.synchronize()
        sent, cpu, times = bytes_sent(), 0.0, []
        for _ in range(self.experiment.iterations):
            method.prepare()
            self.worker.synchronize()
            cpu_start, start = time.process_time(), time.perf_counter()
            method.run()
            self.worker.synchronize()
            times.append(round((time.perf_counter() - start) * 1e6, 1))
            cpu += time.process_time() - cpu_start
        sent_after = bytes_sent()
        return {
            "us": times,
            "cpu_ms": round(cpu * 1e3 / self.experiment.iterations, 3),
            "sent_bytes": None if sent is None else ((sent_after or 0) - sent) // self.experiment.iterations,
            **method.parts(),
        }


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return {
        "congestion_control": records.congestion_control(),
        **Measurement(worker, Experiment(**experiment), METHODS, report).run(),
    }


def failed_cell(experiment: Experiment, workers: int, why: str) -> dict[str, Any]:
    """A cell in which no method could be measured, and every row says so."""
    rows = [{"name": name, "halves": METHODS[name].halves, "failure": why, "blocks": []} for name in experiment.methods]
    itemsize = DTYPES[experiment.dtype].itemsize
    sizes = [{"bytes": bytes_, "count": bytes_ // itemsize, "methods": rows} for bytes_ in experiment.sizes]
    return {"plan": asdict(experiment), "workers": workers, "sizes": sizes, "fits": {}}


def fits(sizes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Latency and time per byte of each method in place, from its median times, for those with two sizes or more.

    alpha: seconds. beta: seconds per byte of the whole tensor.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for size in sizes:
        for method in size["methods"]:
            if method["blocks"] and not method["failure"]:
                times = [us for block in method["blocks"] for us in slowest_rank(block["us"])]
                points.setdefault(method["name"], []).append((size["bytes"], statistics.median(times) / 1e6))
    made = {}
    for name, found in points.items():
        if len({bytes_ for bytes_, _ in found}) > 1:
            fitted = cost_model.fit([bytes_ for bytes_, _ in found], [seconds for _, seconds in found])
            made[name] = asdict(fitted)
    return made
