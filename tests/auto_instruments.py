"""What ``auto`` measures with, as a test prescribes it: no decision hangs on this machine's time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from dear._assembly import Setting
from dear.cost_model import AlphaBeta
from planner.codecs import Cost
from planner.instruments import Instruments
from planner.machine import Machine
from planner.network import Network, flat

FAST, SLOW = AlphaBeta(1e-6, 1e-12), AlphaBeta(1e-4, 1e-5)  # for models of kilobytes


class Watch:
    """A stopwatch of a model whose layers take what a test says."""

    def __init__(self, layers, seconds):
        self.layers, self._seconds = layers, seconds

    def step_began(self): ...

    def remove(self): ...

    def times(self):
        if self.layers is None:
            raise OSError("the clock broke")
        count = len(self.layers)
        return list(range(count)), [self._seconds] * count, [2 * self._seconds] * count


@dataclass
class Prescribed(Instruments):
    """line: between two ranks. takes: the seconds of a step by its setting. wrong: a sentence that the probe raises,
    after so many good probes."""

    line: AlphaBeta
    takes: object
    seconds: float = 0.01
    wrong: str = ""
    probes: int = 0
    skipped: int = 0  # layers that this rank does not see
    fails: str = ""  # where this rank's own measuring fails: "memory" or "layers"
    room: float = math.inf  # bytes that may be reserved
    now: float = 0.0
    asked: list[Setting] = field(default_factory=list)  # settings in which steps were made

    def clock(self):
        return self.now

    def stopwatch(self, model, device):
        from planner.stopwatch import own_layers

        layers = None if self.fails == "layers" else own_layers(model)[self.skipped :]
        return Watch(layers, self.seconds)

    def memory(self, device):
        if self.fails == "memory":
            raise MemoryError("no room for the copy")

    def reserve(self, device, size):
        if size > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nSee the manual.")

    def network(self, group, device, phases, lanes) -> Network:
        self.probes -= 1
        if self.wrong and self.probes < 0:
            raise ValueError(self.wrong)
        return flat(self.line, group.size())

    def machine(self, group, device) -> Machine:
        return Machine(costs={"power": Cost(), "bf16": Cost()})

    def codecs(self, group, device, names, shapes):
        return {}

    def step_ends(self, engine):
        setting = engine._steering.setting
        self.asked.append(setting)
        self.now += self.takes(setting)


def by_size(best: float, least: float = 1.0):
    """Steps that take longest far from the best size: a tenth more for each doubling."""
    return lambda mib: least * (1 + 0.1 * abs(math.log2(mib / best)))
