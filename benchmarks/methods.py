"""The ways of reducing a tensor that the collectives benchmark compares, one small class each.

A method owns its buffers, runs once when told, and can count the elements it got wrong. To add one, write a class with
these members and put it in METHODS.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int32": torch.int32,
}

# Sums of small whole numbers are exact in every type above: a wrong element is a count, and no tolerance is needed.
PATTERN = 5


def local_values(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """What a rank puts in: element i is (i + rank) mod 5."""
    return ((torch.arange(count) + rank) % PATTERN).to(dtype)


def summed_values(count: int, world: int, dtype: torch.dtype) -> Tensor:
    """What every rank must get out: the exact sum of all ranks' local_values."""
    period = torch.stack([(torch.arange(PATTERN) + rank) % PATTERN for rank in range(world)]).sum(0)
    return period.repeat(-(-count // PATTERN))[:count].to(dtype)


def wrong(got: Tensor, expected: Tensor) -> int:
    """Elements that differ; a result of the wrong length is wrong in all of them."""
    return int((got != expected).sum()) if got.shape == expected.shape else expected.numel()


class Method:
    """One way to reduce `count` elements over all ranks. Every rank builds, runs and checks it together."""

    name: ClassVar[str]
    halves: ClassVar[int] = 2  # of an all-reduce: 2, or 1 for a reduce-scatter or an all-gather alone

    def __init__(self, count: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        """`count` is a multiple of the world size, so that every rank's shard is of the same length."""
        self.count, self.dtype, self.group = count, dtype, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.data = torch.empty(count, dtype=dtype)
        self.shard = torch.empty(count // self.world, dtype=dtype)
        self.reset()

    def reset(self) -> None:
        """Puts the inputs back, so that the next run's result can be checked."""
        self.data.copy_(local_values(self.count, self.rank, self.dtype))

    def run(self) -> None:
        """One exchange, finished when it returns."""
        raise NotImplementedError

    def wrong(self) -> int:
        """Wrong elements on this rank, after a reset and one run."""
        return wrong(self.data, summed_values(self.count, self.world, self.dtype))

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of a whole tensor."""
        return whole.chunk(self.world)[self.rank]


class AllReduce(Method):
    """The backend's own all_reduce, in place."""

    name = "all_reduce"

    def run(self) -> None:
        dist.all_reduce(self.data, group=self.group)


class Native(Method):
    """The backend's own reduce_scatter, then its all_gather."""

    name = "native"

    def run(self) -> None:
        dist.reduce_scatter_tensor(self.shard, self.data, group=self.group)
        dist.all_gather_into_tensor(self.data, self.shard, group=self.group)


class ReduceScatterHalf(Method):
    """Checks of a reduce-scatter alone: the shard holds the sum of everybody's part."""

    halves = 1

    def wrong(self) -> int:
        return wrong(self.shard, self.own(summed_values(self.count, self.world, self.dtype)))


class AllGatherHalf(Method):
    """Inputs and checks of an all-gather alone: shards of the sum go in, the whole sum comes out."""

    halves = 1

    def reset(self) -> None:
        self.data.zero_()  # first, since the shard may be a part of it
        self.shard.copy_(self.own(summed_values(self.count, self.world, self.dtype)))


class NativeReduceScatter(ReduceScatterHalf):
    """The backend's own reduce_scatter alone."""

    name = "native-rs"

    def run(self) -> None:
        dist.reduce_scatter_tensor(self.shard, self.data, group=self.group)


class NativeAllGather(AllGatherHalf):
    """The backend's own all_gather alone."""

    name = "native-ag"

    def run(self) -> None:
        dist.all_gather_into_tensor(self.data, self.shard, group=self.group)


def _dear() -> Any:
    """The library, imported late: torch's own methods can be measured where the extension is not built."""
    import dear

    return dear


class InPlace(Method):
    """The shard is this rank's range of the whole tensor, as in DDP's buckets and as in an in-place all_reduce."""

    def __init__(self, count: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        super().__init__(count, dtype, group)
        self.shard = self.own(self.data)
        self.reset()


class Ring(InPlace):
    """This library's ring: reduce-scatter, then all-gather."""

    name = "ring"

    def run(self) -> None:
        dear = _dear()
        dear.reduce_scatter(self.data, self.shard, group=self.group, algorithm="ring").wait()
        dear.all_gather(self.shard, self.data, group=self.group, algorithm="ring").wait()


class RingReduceScatter(InPlace, ReduceScatterHalf):
    """This library's ring, reduce-scatter alone."""

    name = "ring-rs"

    def run(self) -> None:
        _dear().reduce_scatter(self.data, self.shard, group=self.group, algorithm="ring").wait()


class RingAllGather(InPlace, AllGatherHalf):
    """This library's ring, all-gather alone."""

    name = "ring-ag"

    def run(self) -> None:
        _dear().all_gather(self.shard, self.data, group=self.group, algorithm="ring").wait()


_ALL: list[type[Method]] = [
    AllReduce,
    Native,
    NativeReduceScatter,
    NativeAllGather,
    Ring,
    RingReduceScatter,
    RingAllGather,
]
METHODS: dict[str, Callable[[int, torch.dtype, dist.ProcessGroup], Method]] = {one.name: one for one in _ALL}
HALVES: dict[str, int] = {one.name: one.halves for one in _ALL}
