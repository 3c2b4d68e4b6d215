"""Where each parameter stands in the flat buffers, and which flat ranges this rank updates.

DDP's buckets give the order. What each rank owns of a bucket is the update strategy's to say; it stays while the layout
does, however buckets are fused.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dear import _C


@dataclass(frozen=True)
class Place:
    """A parameter's elements ``[start, stop)`` of its bucket's flat buffer, laid out with ``stride``."""

    param: torch.nn.Parameter
    bucket: int
    start: int
    stop: int
    stride: tuple[int, ...]
    shape: torch.Size  # the parameter's: asking one that is pending costs ten times as much

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter-shaped view of the bucket's flat buffer."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)

    def flatten(self, value: torch.Tensor) -> torch.Tensor:
        """A parameter-shaped tensor as the flat run of elements it would be in the buffer."""
        flat = torch.empty(self.stop - self.start, dtype=value.dtype, device=value.device)
        flat.as_strided(self.shape, self.stride).copy_(value)
        return flat


@dataclass
class Segment:
    """A run of what this rank owns of a bucket, which one optimizer group updates as one tensor: a flat one, or, where
    parameters stay whole, a parameter's own."""

    bucket: int
    start: int
    stop: int
    optimizer: int
    group: int
    at: int  # where it begins in this rank's chunk
    whole: bool
    places: list[Place]
    tensor: torch.nn.Parameter = field(init=False)

    def is_used(self, unused: set[torch.nn.Parameter]) -> bool:
        """Whether it takes part in a step; where parameters may go ``unused``, a segment is of one."""
        return self.places[0].param not in unused

    def view(self, full: torch.Tensor) -> torch.Tensor:
        """The segment's tensor, in the bucket's flat buffer."""
        return self.places[0].view(full) if self.whole else full[self.start : self.stop]

    def view_of_chunk(self, shard: torch.Tensor) -> torch.Tensor:
        """The same in this rank's chunk."""
        if self.whole:
            place = self.places[0]
            return shard.as_strided(place.shape, place.stride, shard.storage_offset() + self.at)
        return shard[self.at : self.at + self.stop - self.start]

    def part(self, place: Place, value: torch.Tensor) -> torch.Tensor:
        """What lies in the segment of a tensor of the parameter's shape."""
        if self.whole:
            return value
        start, stop = max(self.start, place.start), min(self.stop, place.stop)
        return place.flatten(value)[start - place.start : stop - place.start]

    def slot(self, place: Place, tensor: torch.Tensor) -> torch.Tensor:
        """Where that part stands in a tensor like the segment's."""
        if self.whole:
            return tensor
        start, stop = max(self.start, place.start), min(self.stop, place.stop)
        return tensor[start - self.start : stop - self.start]


@dataclass
class Layout:
    """The buckets' flat buffers, what lies in them, who owns what, and which buckets travel together (see
    :meth:`fuse`)."""

    buckets: list[_C.Bucket]
    places: list[Place]
    full: list[torch.Tensor]
    owners: list[_C.Ownership] = field(init=False)  # by bucket
    shard: list[torch.Tensor] = field(init=False)  # this rank's chunks
    group_of_bucket: list[int] = field(init=False)
    groups: list[list[Place]] = field(init=False)  # by fusion group
    pending: list[list[Place]] = field(init=False)  # by the barrier's groups

    def __post_init__(self) -> None:
        self._buckets: list[list[Place]] = [[] for _ in self.buckets]
        for place in self.places:
            self._buckets[place.bucket].append(place)

    def in_bucket(self, bucket: int) -> list[Place]:
        """The places of one bucket, in order."""
        return self._buckets[bucket]

    def between(self, bucket: int, start: int, stop: int) -> list[Place]:
        """Those of them that have an element in ``[start, stop)``, and those without elements that stand there, or at
        its end."""
        places = self._buckets[bucket]
        first = bisect.bisect_left(places, start, key=lambda place: place.stop)
        last = bisect.bisect_right(places, stop, key=lambda place: place.start)
        return [
            place
            for place in places[first:last]
            if place.start == place.stop or max(start, place.start) < min(stop, place.stop)
        ]

    def fuse(self, sizes: list[int]) -> None:
        """Makes fusion groups of so many consecutive buckets each."""
        self.group_of_bucket = [group for group, size in enumerate(sizes) for _ in range(size)]
        self.groups = [[] for _ in sizes]
        for group, places in zip(self.group_of_bucket, self._buckets, strict=True):
            self.groups[group].extend(places)

    def split(self, optimizer_of: dict[torch.nn.Parameter, int], optimizers: int) -> None:
        """Makes the barrier's groups: a fusion group has one for each of several optimizers."""
        self.pending = self.groups
        if optimizers > 1:
            self.pending = [
                [place for place in group if optimizer_of.get(place.param) == number]
                for group in self.groups
                for number in range(optimizers)
            ]

    def views(self, group: int) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The parts of the full buffers where a fusion group's parameters stand, in their shapes."""
        return {place.param: place.view(self.full[place.bucket]) for place in self.groups[group]}

    def buffers(self, optimizer_of: dict[torch.nn.Parameter, int], optimizers: int) -> list[_C.BucketBuffers]:
        """What the scheduler moves. With several ``optimizers`` each gathers its own parameters."""
        buffers = []
        for index, (shard, full, owners) in enumerate(zip(self.shard, self.full, self.owners, strict=True)):
            portions = []
            for number in range(optimizers if optimizers > 1 else 0):
                own = [place for place in self._buckets[index] if optimizer_of.get(place.param) == number]
                portions.append(restrict(owners, own))
            buffers.append(_C.BucketBuffers(shard, full, owners, portions))
        return buffers

    def gather(self, lane: _C.Lane, bucket: int, flat: torch.Tensor, label: str) -> None:
        """Completes a flat tensor like the bucket's, of which each rank has what it owns. Collective."""
        parts, owners = [(flat, flat[:0])], [self.owners[bucket]]
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label, owners).wait()

    def parts(self, place: Place, rank: int) -> list[torch.Tensor]:
        """The parts of this rank's chunk, which is ``rank``'s, that lie in a place."""
        found, at = [], 0
        for begin, end in self.owners[place.bucket].ranges(rank):
            start, stop = max(begin, place.start), min(end, place.stop)
            if start < stop:
                found.append(self.shard[place.bucket][at + start - begin : at + stop - begin])
            at += end - begin
        return found

    def unpack(self, bucket: int, rank: int, chunk: torch.Tensor, flat: torch.Tensor) -> None:
        """Copies a rank's chunk to where it belongs in a flat tensor like the bucket's."""
        at = 0
        for start, stop in self.owners[bucket].ranges(rank):
            flat[start:stop] = chunk[at : at + stop - start]
            at += stop - start


def restrict(owners: _C.Ownership, places: Iterable[Place]) -> _C.Ownership:
    """The same owners, of these places only."""
    spans = [(place.start, place.stop) for place in places]
    by_rank: list[list[tuple[int, int]]] = []
    for rank in range(owners.world):
        ranges: list[tuple[int, int]] = []
        for start, stop in _overlaps(owners.ranges(rank), spans):
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        by_rank.append(ranges)
    return _C.Ownership(owners.numel, by_rank)


def _overlaps(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The common parts of two ascending lists of ranges, none of them empty."""
    i = j = 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < stop:
            yield start, stop
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1


def stride_in_bucket(param: torch.Tensor) -> tuple[int, ...]:
    """How a parameter lies in its bucket: dense ones keep their strides, as they do in DDP."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(param.detach())
    return param.stride() if dense else torch.empty(param.size(), device="meta").stride()


def read_places(buckets: list[_C.Bucket], params: Iterable[torch.nn.Parameter]) -> list[Place]:
    """Where DDP put each parameter."""
    # The bucket's handles are the same tensors; the caller's objects are the ones optimizers know.
    known = {id(param): param for param in params}
    places = []
    for index, bucket in enumerate(buckets):
        for param, grad in zip(bucket.params, bucket.grads, strict=True):
            start = int(grad.storage_offset() - bucket.buffer.storage_offset())
            places.append(
                Place(known[id(param)], index, start, start + param.numel(), stride_in_bucket(param), param.size())
            )
    return places


def cut_segments(
    layout: Layout,
    rank: int,
    optimizer: int,
    group_of: dict[torch.nn.Parameter, int],
    whole: set[torch.nn.Parameter],
    kind_of: Callable[[torch.nn.Parameter], Hashable],
) -> list[Segment]:
    """What this rank owns of an optimizer's parameters as few tensors: those that stay ``whole`` each in its own shape,
    of the others neighbours of one group and one ``kind_of`` merged.

    Merging is exact for elementwise optimizers. Parameters outside the optimizer get no segment.
    """
    segments: list[Segment] = []
    for index, owners in enumerate(layout.owners):
        kind: Hashable = None  # of the last segment, while it may grow
        at = 0
        # Parameters without elements have optimizer state all the same: whoever owns what stands around them has it.
        for begin, end in owners.ranges(rank) if owners.numel else [(0, 0)]:
            for place in layout.between(index, begin, end):
                start, stop = max(begin, place.start), min(end, place.stop)
                if place.param not in group_of:
                    kind = None
                    continue
                group = group_of[place.param]
                mine = None if place.param in whole else (group, kind_of(place.param))
                if mine is not None and mine == kind and segments[-1].stop == start:
                    segments[-1].stop = stop
                    segments[-1].places.append(place)
                else:
                    where = at + start - begin
                    segments.append(Segment(index, start, stop, optimizer, group, where, mine is None, [place]))
                kind = mine
            at += end - begin
    for segment in segments:
        segment.tensor = torch.nn.Parameter(segment.view(layout.full[segment.bucket]))
        segment.tensor.grad = segment.view_of_chunk(layout.shard[segment.bucket])
    return segments
