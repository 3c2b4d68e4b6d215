"""What a compressor works on: the gradients of one bucket, flat, with the buffers that serve them every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One parameter's gradient: elements ``[start, start + rows * columns)`` of the group's flat gradient.

    ``rows`` is the size of the outermost dimension in memory, so a convolution's [out, in, h, w] is a matrix of
    [out, in * h * w] and a channels-last one the same with its columns in another order. A vector has one column.
    """

    name: str
    start: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.numel


def matrix_shape(grad: Tensor) -> tuple[int, int]:
    """Rows and columns under which a dense gradient is compressed (see :class:`Member`)."""
    sizes = [size for size, _ in sorted(zip(grad.shape, grad.stride(), strict=True), key=lambda d: -d[1]) if size > 1]
    if len(sizes) < 2:
        return grad.numel(), 1
    return sizes[0], grad.numel() // sizes[0]


def in_parts(sizes: dict[str, int], numel: int) -> list[list[str]]:
    """Consecutive parameters (name: elements) in parts of about ``numel`` elements; no parameter is cut."""
    total = sum(sizes.values())
    target = max(1, total) / max(1, total // numel)
    parts: list[list[str]] = []
    begin, last = 0, -1
    for name, size in sizes.items():
        part = int((begin + size / 2) / target)  # that in which the parameter's middle lies
        if part != last:
            parts.append([])
        parts[-1].append(name)
        begin, last = begin + size, part
    return parts


@dataclass(eq=False)
class Group:
    """Consecutive gradients that are compressed and sent together.

    ``gradient`` [n] is this rank's gradient before ``encode`` and the mean over the ranks after ``decode``. ``error``
    [n] float32 is what was not sent yet, where the compressor keeps it flat; ``owner_error`` is the same for the
    shard of the result that this rank owns, in units of the mean. ``buffers`` and ``feedback`` are filled when the
    group is first seen, so that later steps allocate nothing.
    """

    members: list[Member]
    dtype: torch.dtype
    device: torch.device
    rank: int
    world: int
    label: str
    gradient: Tensor = field(init=False)
    error: Tensor | None = None
    owner_error: Tensor | None = None
    step: int = 0
    feedback: list[Tensor] = field(default_factory=list)
    buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = field(default_factory=dict)
    private: Any = None  # the compressor's own
    codec: Any = None  # what drives it, native
    inner: Group | None = None  # in two levels: this rank's members of it, among nodes
    dropped: Tensor = field(init=False)
    nonfinite: Tensor | None = None  # not zero somewhere if any rank dropped anything

    def __post_init__(self) -> None:
        self.dropped = torch.zeros(1, dtype=torch.int32, device=self.device)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def numel(self) -> int:
        return self.members[-1].stop

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of that name, shape and type, made of zeros at the first call; the same at every later step."""
        key = (name, tuple(shape), dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.zeros(*shape, dtype=dtype, device=self.device)
        return self.buffers[key]


def settle_errors(groups: Iterable[Group]) -> None:
    """Makes the groups' error feedback complete: a codec may have left part of it for the next step. Nothing is in
    flight."""
    for group in groups:
        group.codec.settle()


def compressed_here(groups: Iterable[Group]) -> list[Group]:
    """What this rank compresses of the groups: in two levels its members of them."""
    return [group if group.inner is None else group.inner for group in groups]
