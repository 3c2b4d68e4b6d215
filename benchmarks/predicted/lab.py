"""The emulated network of the benchmarks as a cluster: its constants, each from one measurement that is stored.

They are read from raw results: α of each phase and number of workers from a fit of the collectives, β from the rate;
what gloo's own halves cost beyond their bytes from a run at 1 Gbit/s; the CPU time of a byte sent from one cell of
training steps; the times of encoding, merging and decoding from one breakdown. Some are set by hand: see below.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dear.cost_model import AlphaBeta
from planner.codecs import Cost
from planner.machine import HOOK, Machine
from planner.network import LINK, Network, measured

from ..network.namespaces import BURST_SECONDS, MIN_BURST
from ..network.rates import bits
from ..stats import FLOOR, is_plain_ddp, slowest_rank

HEADERS = 1.044  # bytes on the wire to bytes of payload, at frames of 1500 bytes
LINES = {2: "collectives-2w-2.5gbit.json", 4: "collectives-4w-fast.json"}
HALVES, MEMORY = "collectives-1gbit.json", "collectives-unlimited.json"
STEPS, BREAKDOWN = "training-sgd-1gbit.json", "training-2w-breakdown.json"
FITTED_ON = (STEPS, BREAKDOWN)  # training steps that constants come from: not to be predicted
OURS = {"all_reduce": "all_reduce", "reduce_scatter": "ring-rs", "all_gather": "ring-ag"}
GLOO = {"all_reduce": "all_reduce", "reduce_scatter": "native-rs", "all_gather": "native-ag"}
BROKEN_DOWN = {"bf16:4": "bf16", "acp:4": "acp", "power:4": "power", "topk:0.01": "topk", "sign": "sign"}
UPDATES = {"sgd": 3, "adamw": 7}  # numbers that an update reads and writes for each element


def wire_seconds(size: int, workers: int, rate: str) -> float:
    """What half an all-reduce of so many bytes takes a link, headers included."""
    return HEADERS * size * (workers - 1) / workers * 8 / bits(rate)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def slowest_us(method: dict[str, Any]) -> float:
    """The median microseconds of the slowest rank, of a method's account."""
    return statistics.median(slowest for block in method["blocks"] for slowest in slowest_rank(block["us"]))


@dataclass(frozen=True)
class Lab:
    """alphas: seconds by workers and method. beyond: what a method of gloo takes at 1 Gbit/s, times its bytes, by
    workers and method. memory: seconds per byte sent where no rate limits. cpu: seconds of a core per byte sent."""

    alphas: dict[tuple[int, str], float]
    beyond: dict[tuple[int, str], float]
    memory: float
    cpu: float
    costs: dict[str, Cost]
    copy_bytes: float = 12e9  # a second, of one core's memory traffic: what an update runs at

    @classmethod
    def read(cls, results: Path) -> Lab:
        alphas, beyond = {}, {}
        for workers, name in LINES.items():
            cell = _read(results / name)["cells"][0]
            for method, line in cell["fits"].items():
                alphas[workers, method] = line["alpha"]
        for cell in _read(results / HALVES)["cells"]:
            size = cell["sizes"][-1]
            for method in size["methods"]:
                wire = wire_seconds(size["bytes"], cell["workers"], cell["rate"])
                beyond[cell["workers"], method["name"]] = slowest_us(method) / 1e6 / wire
        size = _read(results / MEMORY)["cells"][0]["sizes"][-1]
        whole = next(method for method in size["methods"] if method["name"] == "all_reduce")
        return cls(alphas, beyond, slowest_us(whole) / 1e6 / size["bytes"], _cpu(results), _costs(results))

    def network(self, rate: str, workers: int, methods: dict[str, str] = OURS) -> Network:
        part = (workers - 1) / workers
        beta = max(HEADERS * 8 / bits(rate), self.memory)
        lines = {}
        for phase, method in methods.items():
            more = (
                self.beyond[workers, method] if method.startswith("native") else 2.0 if phase == "all_reduce" else 1.0
            )
            lines[phase] = AlphaBeta(self.alphas[workers, method], more * part * beta)
        burst = 0.0 if math.isinf(bits(rate)) else max(8 * MIN_BURST / bits(rate), BURST_SECONDS)  # whichever is more
        return replace(measured(workers, lines), bursts={LINK: burst})

    def barrier(self, workers: int) -> float:
        """Seconds of the barrier at the end of each step of a compute floor: gloo's takes log2 P rounds of messages,
        its ring all-reduce 2 (P - 1)."""
        return self.alphas[workers, OURS["all_reduce"]] * math.ceil(math.log2(workers)) / (2 * (workers - 1))

    def machine(self, workers: int, cores: int = 2) -> Machine:
        """A worker's share of a machine that has so many cores."""
        return Machine(cores / workers, self.cpu, HOOK, self.costs, synchronous=True)

    def update(self, optimizer: str, elements: int) -> float:
        return 4.0 * elements * UPDATES[optimizer] / self.copy_bytes


def _cpu(results: Path) -> float:
    """What DDP's processes spend beyond those that do not communicate, by bytes sent."""
    strategies = {one["name"]: one["blocks"] for one in _read(results / STEPS)["cells"][0]["strategies"]}

    def median(name: str, key: str) -> float:
        return statistics.median(value for block in strategies[name] for value in block[key])

    idle = median(FLOOR, "cpu_ms_per_step")
    return statistics.median(
        (median(name, "cpu_ms_per_step") - idle) / 1e3 / median(name, "sent_bytes_per_step")
        for name in strategies
        if is_plain_ddp(name)
    )


def _costs(results: Path) -> dict[str, Cost]:
    cell = _read(results / BREAKDOWN)["cells"][0]
    gradients = next(one for one in cell["strategies"] if one["name"] == "ddp:2")["payload_bytes_per_step"]
    costs = {}
    for one in cell["strategies"]:
        if one["name"] in BROKEN_DOWN:
            phases = one["breakdown"]["phases"]
            each = {key: (phases[key] or 0.0) / 1e3 / gradients for key in ("encode", "merge", "decode")}
            costs[BROKEN_DOWN[one["name"]]] = Cost(**each)
    # torch's fp16 hook casts, with operators of torch: there and back, and a division.
    costs["fp16"] = Cost(encode=2 * costs["bf16"].encode, decode=2 * costs["bf16"].decode)
    return costs
