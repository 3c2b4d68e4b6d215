"""When what moves, and who updates: one class for each way of training, as it adds a step to a simulation.

A way of training that is new is a subclass and an entry in SCHEDULES.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from typing import ClassVar

from dear import _fusion

from .codecs import EXACT, Codec
from .events import Task
from .profile import Group, Piece, Profile, buckets, fusion_groups
from .units import MIB
from .worker import COMPUTE, DECODE, Gate, Worker

FIRST_BUCKET = MIB  # DDP's own, where the user names no size
DDP_BUCKET = 25 * MIB


def default_cap(profile: Profile) -> float:
    """The size of a fusion group that ``dear.attach`` takes where the user names none, without a compressor."""
    return float(_fusion.default_group_bytes(profile.bytes))


class Schedule(ABC):
    """Adds steps; what is due in the next forward pass stands in ``gates``."""

    def __init__(self, worker: Worker, codec: Codec, cap: float | None) -> None:
        self.worker, self.codec, self.cost = worker, codec, worker.machine.cost(codec)
        self.groups = self.cut(worker.profile, codec, cap)
        self.gates: list[Gate] = []

    @classmethod
    def cut(cls, profile: Profile, codec: Codec, cap: float | None) -> list[Group]:
        """The groups in which gradients travel; a cap of None is what the way of training does by itself."""
        if codec is not EXACT or cap is None:
            default = _fusion.default_group_bytes(profile.bytes, codec.shrinks)
            return buckets(profile, cap or default)
        return fusion_groups(profile, cap)

    @abstractmethod
    def step(self) -> Task:
        """Adds a step; returns the last task of its backward pass."""

    def encode(self, number: int, group: Group) -> None:
        self.worker.work(f"encode {number}", COMPUTE, self.cost.encode * group.bytes)

    def first_phase(self, number: int, group: Group, ready: Task) -> tuple[Task, float]:
        """Everything before the last all-gather, and the bytes of that."""
        worker, rounds = self.worker, self.codec.rounds(group.pieces)
        merge = self.cost.merge * group.bytes / len(rounds)
        task = ready
        for index, bytes_ in enumerate(rounds):
            task = worker.exchange("all_to_all", f"all-to-all {number}", f"first {index}", bytes_, [task])
            if index < len(rounds) - 1:
                task = worker.exchange("all_gather", f"all-gather {number}", f"second {index}", bytes_, [task], merge)
        return task, rounds[-1]

    @property
    def updates(self) -> float:
        """The share of a whole update that each rank makes."""
        return 1.0

    def second_phase(self, number: int, group: Group, after: Task, bytes_: float) -> Task:
        """The last all-gather of a compressed group, and decoding."""
        merge = self.cost.merge * group.bytes / len(self.codec.rounds(group.pieces))
        gathered = self.worker.exchange("all_gather", f"all-gather {number}", "all-gather", bytes_, [after], merge)
        return self.worker.work(f"decode {number}", DECODE, self.cost.decode * group.bytes, [gathered])


class NoExchange(Schedule):
    """The compute floor."""

    def step(self) -> Task:
        self.worker.forward(())
        last = [task for _, _, task in self.worker.backward(self.groups)][-1]
        self.worker.compute("update", self.worker.profile.update)
        return last


class UnderBackward(Schedule):
    """Everything is exchanged under backward, and the update waits for the last."""

    @abstractmethod
    def reduce(self, number: int, group: Group, after: Task) -> Task:
        """A group on its way, once it is encoded; returns what ends with its gradients."""

    def step(self) -> Task:
        worker = self.worker
        worker.forward(())
        ends, last = [], None
        for number, group, ready in worker.backward(self.groups):
            last = ready
            self.encode(number, group)
            ends.append(self.reduce(number, group, worker.compute("sent", 0.0)))
        worker.compute("wait", 0.0, ends)
        worker.compute("update", worker.profile.update)
        assert last is not None
        return last


class DDP(UnderBackward):
    """DistributedDataParallel's all-reduces. Its fp16 hook casts before and after."""

    @classmethod
    def cut(cls, profile: Profile, codec: Codec, cap: float | None) -> list[Group]:
        return buckets(profile, DDP_BUCKET, FIRST_BUCKET) if cap is None else buckets(profile, cap)

    def reduce(self, number: int, group: Group, after: Task) -> Task:
        bytes_ = sum(self.codec.rounds(group.pieces))
        reduced = self.worker.exchange("all_reduce", f"all-reduce {number}", "all-reduce", bytes_, [after])
        return self.worker.work(f"decode {number}", DECODE, self.cost.decode * group.bytes, [reduced])


class Hook(UnderBackward):
    """A compressor as a plain DDP hook: both phases."""

    def reduce(self, number: int, group: Group, after: Task) -> Task:
        return self.second_phase(number, group, *self.first_phase(number, group, after))


class Sharded(Schedule):
    """DeAR; between the halves each rank updates its share, and updated parameters are gathered."""

    imbalance: ClassVar[float] = 1.0  # of the busiest rank's update, to an even share

    @property
    def updates(self) -> float:
        return self.imbalance / self.worker.network.workers

    def step(self) -> Task:
        worker = self.worker
        worker.forward(self.gates)
        reduced, last = [], None
        for number, group, ready in worker.backward(self.groups):
            last = ready
            reduced.append(
                worker.exchange("reduce_scatter", f"reduce-scatter {number}", "reduce-scatter", group.bytes, [ready])
            )
        share = worker.profile.update / worker.profile.bytes * self.updates
        updates = [
            worker.compute("update", share * group.bytes, [task])
            for group, task in zip(self.groups, reduced, strict=True)
        ]
        self.gates = []
        for number in worker.gather_order(self.groups):
            group = self.groups[number]
            task = worker.exchange("all_gather", f"all-gather {number}", "all-gather", group.bytes, [updates[number]])
            self.gates.append(Gate(group.layers, (task,)))
        assert last is not None
        return last


class Owned(Sharded):
    """The same with whole parameters: the busiest rank has more than its share."""

    imbalance = 1.05


class Replicated(Schedule):
    """DeAR; averaged gradients are gathered, and every rank updates everything, a group at its first reader."""

    def step(self) -> Task:
        worker = self.worker
        worker.forward(self.gates)
        first: list[tuple[Task, float]] = []
        last = None
        for number, group, ready in worker.backward(self.groups):
            last = ready
            first.append(self.reduce(number, group, ready))
        self.gates = []
        share = worker.profile.update / worker.profile.bytes
        for number in worker.gather_order(self.groups):
            group = self.groups[number]
            task = self.gather(number, group, *first[number])
            self.gates.append(Gate(group.layers, (task,), share * group.bytes))
        assert last is not None
        return last

    def reduce(self, number: int, group: Group, ready: Task) -> tuple[Task, float]:
        if self.codec is not EXACT:
            self.encode(number, group)
            return self.first_phase(number, group, self.worker.compute("sent", 0.0))
        name = f"reduce-scatter {number}"
        return self.worker.exchange("reduce_scatter", name, "reduce-scatter", group.bytes, [ready]), group.bytes

    def gather(self, number: int, group: Group, after: Task, bytes_: float) -> Task:
        if self.codec is not EXACT:
            return self.second_phase(number, group, after, bytes_)
        return self.worker.exchange("all_gather", f"all-gather {number}", "all-gather", bytes_, [after])


class FSDP2(Schedule):
    """fully_shard of every layer, parameters kept from forward to backward. On a GPU one all-gather is ahead of the
    layer that computes; where collectives are synchronous, nothing overlaps."""

    @classmethod
    def cut(cls, profile: Profile, codec: Codec, cap: float | None) -> list[Group]:
        by_layer: defaultdict[int, list[Piece]] = defaultdict(list)
        for parameter in buckets(profile, 1.0):
            for piece in parameter.pieces:
                by_layer[piece.layer].append(piece)
        return [Group(tuple(pieces)) for pieces in by_layer.values()]

    def __init__(self, worker: Worker, codec: Codec, cap: float | None) -> None:
        super().__init__(worker, codec, cap)
        self._updated: list[Task] = []

    @property
    def updates(self) -> float:
        return 1 / self.worker.network.workers

    def step(self) -> Task:
        worker = self.worker
        lane = COMPUTE if worker.machine.synchronous else "all-gather"
        parts = {min(group.layers): group for group in self.groups}
        previous = [self._updated, self._updated]  # what ends before the gather of a layer, and of the next one, begins
        for number, layer in enumerate(worker.profile.layers):
            group = parts.get(number)
            if group is not None:
                gathered = worker.exchange("all_gather", f"all-gather {number}", lane, group.bytes, previous[0])
                task = worker.compute(f"forward {number}", layer.forward, [gathered])
                previous = [previous[1], [task]]
            else:
                worker.compute(f"forward {number}", layer.forward)
        lane = COMPUTE if worker.machine.synchronous else "reduce-scatter"
        ends, last = [], None
        for number, group, ready in worker.backward(self.groups):
            last = ready
            ends.append(worker.exchange("reduce_scatter", f"reduce-scatter {number}", lane, group.bytes, [ready]))
        worker.compute("wait", 0.0, ends)
        self._updated = [worker.compute("update", worker.profile.update * self.updates)]
        assert last is not None
        return last


SCHEDULES: dict[str, type[Schedule]] = {
    "none": NoExchange,
    "ddp": DDP,
    "hook": Hook,
    "fsdp2": FSDP2,
    "sharded": Sharded,
    "owned": Owned,
    "replicated": Replicated,
}
