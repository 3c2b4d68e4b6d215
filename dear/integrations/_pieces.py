"""A tensor of which a rank has pieces, as :mod:`torch.distributed.checkpoint` (DCP) saves and loads them.

A rank's part of an optimizer's state is a run of a parameter's flat elements, which may begin and end inside a row. DCP
knows boxes: so a run is cut into boxes of the parameter's own shape, and whoever loads the checkpoint, with however
many ranks or with another library, sees an ordinary tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

__all__ = ["Pieces", "boxes"]

Box = tuple[tuple[int, ...], tuple[int, ...], int]  # offsets, sizes, and the flat element that it begins with


class Pieces(torch.Tensor):
    """Looks like the whole tensor, whose memory it does not have.

    Implements DCP's protocol for tensor subclasses (``torch.distributed._checkpointable``).
    """

    _pieces: dict[tuple[int, ...], torch.Tensor]  # by where they begin

    @classmethod
    def of(cls, size: torch.Size, stride: Sequence[int], runs: Sequence[tuple[int, torch.Tensor]]) -> Pieces:
        """Those of runs of flat elements, whose values stay where they are. ``stride``: of a dense tensor."""
        made = runs[0][1].new_empty(()).expand(size).as_subclass(cls)
        made._pieces = {}
        for start, values in runs:
            for offsets, sizes, begin in boxes(size, stride, start, start + values.numel()):
                box = values.as_strided(sizes, tuple(stride), values.storage_offset() + begin - start)
                made._pieces[offsets] = box
        return made

    def __create_write_items__(self, fqn: str, whole: torch.Tensor) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(offsets, piece),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=whole.size(),
                ),
            )
            for offsets, piece in self._pieces.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(offsets, piece) for offsets, piece in self._pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._pieces[tuple(index.offset)]


def _chunk(offsets: tuple[int, ...], piece: torch.Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=piece.size())


def boxes(size: Sequence[int], stride: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that the elements ``[start, stop)`` of a dense tensor fill, in the order of its memory: at most two for
    each dimension but the last, and one more."""
    order = sorted(range(len(size)), key=lambda dim: -stride[dim])  # from the slowest to the fastest
    for offsets, sizes, begin in _in_order([size[dim] for dim in order], start, stop):
        place: dict[int, Any] = dict(zip(order, zip(offsets, sizes, strict=True), strict=True))
        yield tuple(place[dim][0] for dim in range(len(size))), tuple(place[dim][1] for dim in range(len(size))), begin


def _in_order(size: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The same where the dimensions lie from the slowest to the fastest."""
    if start >= stop:
        return
    if not size:
        yield (), (), start
        return
    inner = math.prod(size[1:])
    first, into = divmod(start, inner)
    last, beyond = divmod(stop, inner)

    def part(row: int, begin: int, end: int) -> Iterator[Box]:
        for offsets, sizes, at in _in_order(size[1:], begin, end):
            yield (row, *offsets), (1, *sizes), row * inner + at

    if first == last:
        yield from part(first, into, beyond)
        return
    if into:
        yield from part(first, into, inner)
        first += 1
    if first < last:
        yield (first, *(0 for _ in size[1:])), (last - first, *size[1:]), first * inner
    if beyond:
        yield from part(last, 0, beyond)
