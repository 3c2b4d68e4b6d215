"""Where each parameter stands in the flat buffers, and which flat ranges this rank updates.

DDP's buckets give the order. A bucket of n elements is cut among the ranks as every collective cuts it
(``shard_range``), so the ranges this rank owns do not depend on how buckets are fused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch

from dear import _C
from dear.collectives import shard_range


@dataclass(frozen=True)
class Place:
    """A parameter's elements ``[start, stop)`` of its bucket's flat buffer, laid out with ``stride``."""

    param: torch.nn.Parameter
    bucket: int
    start: int
    stop: int
    stride: tuple[int, ...]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter-shaped view of the bucket's flat buffer."""
        return flat.as_strided(self.param.size(), self.stride, flat.storage_offset() + self.start)

    def flatten(self, value: torch.Tensor) -> torch.Tensor:
        """A parameter-shaped tensor as the flat run of elements it would be in the buffer."""
        flat = torch.empty(self.stop - self.start, dtype=value.dtype, device=value.device)
        flat.as_strided(self.param.size(), self.stride).copy_(value)
        return flat


@dataclass
class Segment:
    """A run of this rank's shard of a bucket that one optimizer group updates as one flat tensor."""

    bucket: int
    start: int
    stop: int
    group: int
    places: list[Place]
    tensor: torch.nn.Parameter = field(init=False)


@dataclass
class Layout:
    """The buckets' flat buffers, what lies in them, and which buckets travel together (see :meth:`fuse`)."""

    buckets: list[_C.Bucket]
    places: list[Place]
    full: list[torch.Tensor]
    shard: list[torch.Tensor]
    group_of_bucket: list[int] = field(init=False)
    groups: list[list[Place]] = field(init=False)  # by fusion group

    def __post_init__(self) -> None:
        self._buckets: list[list[Place]] = [[] for _ in self.buckets]
        for place in self.places:
            self._buckets[place.bucket].append(place)

    def in_bucket(self, bucket: int) -> list[Place]:
        """The places of one bucket, in order."""
        return self._buckets[bucket]

    def fuse(self, sizes: list[int]) -> None:
        """Makes fusion groups of so many consecutive buckets each."""
        self.group_of_bucket = [group for group, size in enumerate(sizes) for _ in range(size)]
        self.groups = [[] for _ in sizes]
        for group, places in zip(self.group_of_bucket, self._buckets, strict=True):
            self.groups[group].extend(places)

    def views(self, group: int) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The parts of the full buffers where a fusion group's parameters stand, in their shapes."""
        return {place.param: place.view(self.full[place.bucket]) for place in self.groups[group]}


def read_places(buckets: list[_C.Bucket], params: Iterable[torch.nn.Parameter]) -> list[Place]:
    """Where DDP put each parameter. Dense parameters keep their strides in the buffer, as they do in DDP."""
    # The bucket's handles are the same tensors; the caller's objects are the ones optimizers know.
    known = {id(param): param for param in params}
    places = []
    for index, bucket in enumerate(buckets):
        for param, grad in zip(bucket.params, bucket.grads, strict=True):
            start = int(grad.storage_offset() - bucket.buffer.storage_offset())
            dense = torch.ops.aten.is_non_overlapping_and_dense(param.detach())
            stride = param.stride() if dense else torch.empty(param.size(), device="meta").stride()
            places.append(Place(known[id(param)], index, start, start + param.numel(), stride))
    return places


def cut_segments(
    layout: Layout,
    world: int,
    rank: int,
    group_of: dict[torch.nn.Parameter, int],
    kind_of: Callable[[torch.nn.Parameter], Hashable],
) -> list[Segment]:
    """This rank's shards as few flat tensors: neighbours of one optimizer group and one ``kind_of`` are merged.

    Merging is exact for elementwise optimizers. Parameters outside the optimizer get no segment.
    """
    segments: list[Segment] = []
    for index, full in enumerate(layout.full):
        begin, end = shard_range(full.numel(), world, rank)
        kinds: list[Hashable] = []
        for place in layout.in_bucket(index):
            start, stop = max(begin, place.start), min(end, place.stop)
            # One without elements has optimizer state all the same: whoever owns what stands around it has it.
            if start > stop or (start == stop and place.stop > place.start) or place.param not in group_of:
                continue
            kind = (group_of[place.param], kind_of(place.param))
            last = segments[-1] if segments else None
            if last and last.bucket == index and last.stop == start and kinds and kinds[-1] == kind:
                last.stop = stop
                last.places.append(place)
            else:
                segments.append(Segment(index, start, stop, kind[0], [place]))
            kinds.append(kind)
    for segment in segments:
        full = layout.full[segment.bucket]
        begin, _ = shard_range(full.numel(), world, rank)
        segment.tensor = torch.nn.Parameter(full[segment.start : segment.stop])
        segment.tensor.grad = layout.shard[segment.bucket][segment.start - begin : segment.stop - begin]
    return segments
