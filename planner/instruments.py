"""What ``auto`` measures with: clocks, the network, memory. Another one may take the place of each, as in tests."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C

from .codec_timing import measured_costs
from .codecs import Cost
from .devices import PASSES
from .machine import Machine
from .network import Network, measured
from .probing import fitted, measure
from .profile import Shape
from .stopwatch import Stopwatch

SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 22)  # bytes of the whole tensor
REPEATS, ATTEMPTS = 5, 2
BUDGET = 2.0  # seconds of the network's probe
COPY = 1 << 24  # bytes, more than caches hold
HOOK = 1e-4  # seconds of a bucket: a wake-up of a lane's thread and one of the thread that computes


class Instruments:
    """The machine's own."""

    _bandwidth = 0.0  # bytes a second

    def clock(self) -> float:
        """Seconds, rising."""
        return time.perf_counter()

    def stopwatch(self, model: DDP, device: torch.device) -> Stopwatch:
        return Stopwatch(model, device)

    def network(
        self, group: dist.ProcessGroup, device: torch.device, phases: Sequence[str], lanes: Mapping[str, _C.Lane]
    ) -> Network:
        """Measured lines of these collectives, in these lanes by phase where there are some, by the fastest of a few
        repeats: what else the machine does is not the network's. Collective; the same on every rank.

        Raises:
            ValueError: times follow no line twice, as where a link stalls; on every rank.
        """
        for attempt in range(ATTEMPTS):
            times = measure(group, device, SIZES, phases, BUDGET, REPEATS, min, lanes)
            try:
                return measured(group.size(), fitted(times))
            except ValueError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("An attempt returns or raises.")

    def memory(self, device: torch.device) -> None:
        """Measures this rank's memory, for machine()."""
        self._bandwidth = memory_bandwidth(device)

    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Machine:
        """What exchanges and codecs cost this rank. Collective."""
        costs = codec_costs(self._bandwidth or memory_bandwidth(device))
        if device.type != "cpu":
            return Machine(costs=costs)
        full = torch.zeros(SIZES[-1] // 4)
        dist.barrier(group)
        begun = time.process_time()
        dist.all_reduce(full, group=group)
        sent = 2 * (group.size() - 1) / group.size() * SIZES[-1]
        busy = (time.process_time() - begun) / sent
        return Machine(cores=cores(), exchange_cpu=busy, hook=HOOK, costs=costs)

    def codecs(
        self, group: dist.ProcessGroup, device: torch.device, names: Sequence[str], shapes: Sequence[Shape]
    ) -> dict[str, Cost]:
        """What compressors of these names cost this rank on such gradients, by name; on another device than the host
        nothing is measured, and the memory's bandwidth tells."""
        return measured_costs(names, group, shapes) if device.type == "cpu" else {}


def cores() -> float:
    """Of this machine, for each of its ranks."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return mine / max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def memory_bandwidth(device: torch.device, repeats: int = 3) -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = torch.zeros(COPY // 4, device=device), torch.zeros(COPY // 4, device=device)
    best = float("inf")
    for _ in range(repeats):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        begun = time.perf_counter()
        target.copy_(source)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * COPY / best


def codec_costs(bandwidth: float) -> dict[str, Cost]:
    """Of compressors, by the passes over gradients that each makes, at that memory bandwidth."""
    return {
        name: Cost(*(each / bandwidth for each in (passes.encode, passes.merge, passes.decode)))
        for name, passes in PASSES.items()
    }
