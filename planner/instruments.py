"""What ``auto`` measures with: clocks, the network, memory. Another one may take the place of each, as in tests."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C

from .codec_timing import measured_costs
from .codecs import Cost
from .devices import PASSES
from .machine import HOOK, Machine
from .network import Network, measured
from .probing import fitted, measure
from .profile import Shape
from .stopwatch import Stopwatch

SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 22)  # bytes of the whole tensor
REPEATS, ATTEMPTS = 5, 2
BUDGET = 2.0  # seconds of the network's probe
PART = 1 << 26  # bytes that are reserved at once
COPY = 1 << 24  # bytes, more than caches hold


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

    def in_steps(self, device: torch.device) -> int:
        """Bytes of this rank that steps take beyond what stands between two of them, as for activations: at the most so
        far. On the host nobody counts."""
        if device.type == "cpu":
            return 0
        return max(0, torch.accelerator.max_memory_allocated(device) - torch.accelerator.memory_allocated(device))

    def reserve(self, device: torch.device, size: int) -> None:
        """Takes so many bytes for a moment, in parts as a model's.

        Raises:
            RuntimeError, MemoryError: what the allocator raises where there are not so many.
        """
        parts = [
            torch.empty(min(PART, size - start), dtype=torch.uint8, device=device) for start in range(0, size, PART)
        ]
        del parts

    def machine(self, group: dist.ProcessGroup, device: torch.device) -> Machine:
        """What exchanges and codecs cost this rank. Collective."""
        costs = codec_costs(self._bandwidth or memory_bandwidth(device))
        if device.type != "cpu":
            return Machine(costs=costs)
        return Machine(cores=cores(group), exchange_cpu=exchange_cpu(group), hook=HOOK, costs=costs)

    def codecs(
        self, group: dist.ProcessGroup, device: torch.device, names: Sequence[str], shapes: Sequence[Shape]
    ) -> dict[str, Cost]:
        """What compressors of these names cost this rank on such gradients, by name; on another device than the host
        nothing is measured, and the memory's bandwidth tells."""
        return measured_costs(names, group, shapes) if device.type == "cpu" else {}


def cores(group: dist.ProcessGroup) -> float:
    """That this rank has, of a core that several ranks of the host may run on its part; whatever the launcher says, and
    wherever it has bound them. Collective."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine), group=group)
    return share_of_cores(everyone, group.rank())


def share_of_cores(everyone: Sequence[tuple[str, set[int]]], rank: int) -> float:
    """everyone: by rank, its host and the cores that it may run on."""
    host, mine = everyone[rank]
    return sum(1 / sum(there == host and core in theirs for there, theirs in everyone) for core in mine)


def exchange_cpu(group: dist.ProcessGroup, repeats: int = 1) -> float:
    """Seconds of a core for each byte that this rank sends of host tensors, receiving included: the median over so many
    all-reduces. Collective."""
    full = torch.zeros(SIZES[-1] // 4)
    sent = 2 * (group.size() - 1) / group.size() * SIZES[-1]
    busy = []
    for _ in range(repeats):
        dist.barrier(group)
        begun = time.process_time()
        dist.all_reduce(full, group=group)
        busy.append((time.process_time() - begun) / sent)
    return statistics.median(busy)


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
