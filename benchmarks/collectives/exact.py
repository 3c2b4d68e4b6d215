"""The exact ways of reducing a tensor that the collectives benchmark compares, one small class each.

A method runs once when told, and can count the elements it got wrong. To add one, write a class with these members and
put it in EXACT. MPI's are in mpi_methods.py; compressors, which are not exact, in compressed.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import dear

from ..worker import Worker

DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int32": torch.int32,
}

Placement = Literal["out_of_place", "in_place"]
PLACEMENTS: tuple[Placement, Placement] = ("out_of_place", "in_place")

# Sums of small whole numbers are exact in every type above: a wrong element is a count, and no tolerance is needed.
PATTERN = 5


def local_values(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """What a rank puts in: element i is (i + rank) mod 5."""
    return ((torch.arange(count) + rank) % PATTERN).to(dtype)


def summed_values(count: int, world: int, dtype: torch.dtype) -> Tensor:
    """What every rank must get out: the exact sum of all ranks' local_values.

    Raises ValueError where there are so many ranks that a sum may not be exact in this type.
    """
    largest = 2**31 - 1 if not dtype.is_floating_point else int(2 / torch.finfo(dtype).eps)
    if (PATTERN - 1) * world > largest:
        raise ValueError(f"sums over {world} ranks are not exact in {dtype}: choose a wider type with --dtype")
    period = torch.stack([(torch.arange(PATTERN) + rank) % PATTERN for rank in range(world)]).sum(0)
    return period.repeat(-(-count // PATTERN))[:count].to(dtype)


def wrong(got: Tensor, expected: Tensor) -> int:
    """Elements that differ; a result of the wrong length is wrong in all of them."""
    if got.shape != expected.shape:
        return expected.numel()
    return int((got != expected.to(got.device)).sum())


@dataclass
class Place:
    """Where methods work at one size: two flat buffers [count], which they share since one runs after another.

    `count` is a multiple of the number of ranks, so that every rank's shard is of the same length.
    """

    count: int
    dtype: torch.dtype
    worker: Worker

    def __post_init__(self) -> None:
        self.first = torch.zeros(self.count, dtype=self.dtype, device=self.worker.device)
        self.second = torch.zeros_like(self.first)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, as a view."""
        return whole.chunk(self.worker.world)[self.worker.rank]

    def fill(self, whole: Tensor) -> None:
        whole.copy_(local_values(self.count, self.worker.rank, self.dtype))

    def expected(self) -> Tensor:
        return summed_values(self.count, self.worker.world, self.dtype)


class Method:
    """One way to reduce a tensor over all ranks. Every rank builds, runs and checks it together.

    Out of place, `data` goes in and `out` comes out, and `data` may be overwritten only by a method that says so. In
    place they are one tensor, as in DDP's buckets.
    """

    name: ClassVar[str]
    halves: ClassVar[int] = 2  # of an all-reduce: 2, or 1 for a reduce-scatter or an all-gather alone
    lossy: ClassVar[bool] = False  # the result is not the sum, by design: an error is measured, and nothing is wrong
    placements: ClassVar[tuple[Placement, ...]] = PLACEMENTS

    def __init__(self, place: Place, group: dist.ProcessGroup, placement: Placement) -> None:
        self.place, self.group = place, group
        self.data = place.first
        self.out = place.first if placement == "in_place" else place.second
        self.shard = self.shard_for(placement)

    def shard_for(self, placement: Placement) -> Tensor:
        """Where this rank's shard of the result is between the halves: at once where it belongs in the end."""
        return self.place.own(self.out)

    def reset(self) -> None:
        """Puts the inputs back, so that the next run's result can be checked."""
        self.out.zero_()
        self.place.fill(self.data)

    def prepare(self) -> None:
        """What must be done before every timed run, and is not timed."""

    def run(self) -> None:
        """One exchange, finished when it returns (device tensors: when the device is)."""
        raise NotImplementedError

    def wrong(self) -> int:
        """Wrong elements on this rank, after a reset and one run."""
        return wrong(self.out, self.place.expected())

    def facts(self) -> dict[str, Any]:
        """What else there is to say of it, the same at every run."""
        return {}

    def parts(self) -> dict[str, list[float]]:
        """Series of the runs since the last call, one value per run; empty where a run has no parts."""
        return {}


class ReduceScatterHalf(Method):
    """A reduce-scatter alone: the shard holds the sum over all ranks. In place, the shard is a part of `data`."""

    halves = 1

    def shard_for(self, placement: Placement) -> Tensor:
        return self.place.own(self.data) if placement == "in_place" else self.place.own(self.out)

    def wrong(self) -> int:
        return wrong(self.shard, self.place.own(self.place.expected()))


class AllGatherHalf(Method):
    """An all-gather alone: shards of the sum go in, the whole sum comes out. In place, the shard is a part of `out`."""

    halves = 1

    def shard_for(self, placement: Placement) -> Tensor:
        return self.place.own(self.out) if placement == "in_place" else self.place.own(self.data)

    def reset(self) -> None:
        self.out.zero_()  # first, since the shard may be a part of it
        self.shard.copy_(self.place.own(self.place.expected()))


class AllReduce(Method):
    """The backend's own all_reduce. torch has it in place only: out of place includes the copy one must make."""

    name = "all_reduce"

    def run(self) -> None:
        if self.out is not self.data:
            self.out.copy_(self.data)
        dist.all_reduce(self.out, group=self.group)


def _native_scatter(one: Method) -> None:
    dist.reduce_scatter_tensor(one.shard, one.data, group=one.group)


def _native_gather(one: Method) -> None:
    dist.all_gather_into_tensor(one.out, one.shard, group=one.group)


def _ring_scatter(one: Method) -> None:
    dear.reduce_scatter(one.data, one.shard, group=one.group, algorithm="ring").wait()


def _ring_gather(one: Method) -> None:
    dear.all_gather(one.shard, one.out, group=one.group, algorithm="ring").wait()


def _made_of(base: type[Method], name: str, *calls: Callable[[Method], None]) -> type[Method]:
    """A method that makes these calls one after the other."""

    def run(self: Method) -> None:
        for call in calls:
            call(self)

    return type(name, (base,), {"name": name, "run": run})


#: native: the backend's own reduce_scatter and all_gather; ring: this library's. -rs, -ag: one of the two alone.
EXACT: list[type[Method]] = [
    AllReduce,
    _made_of(Method, "native", _native_scatter, _native_gather),
    _made_of(ReduceScatterHalf, "native-rs", _native_scatter),
    _made_of(AllGatherHalf, "native-ag", _native_gather),
    _made_of(Method, "ring", _ring_scatter, _ring_gather),
    _made_of(ReduceScatterHalf, "ring-rs", _ring_scatter),
    _made_of(AllGatherHalf, "ring-ag", _ring_gather),
]
