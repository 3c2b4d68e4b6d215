"""What is to be trained: layers with their parameters and times, and how their gradients are put together."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dear import _fusion

from .reading import parsed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """What is computed at once. shapes: of its parameters. forward, backward: seconds of a batch on one worker."""

    name: str
    shapes: tuple[Shape, ...]
    forward: float
    backward: float

    @cached_property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Profile:
    """A model's step on one worker by itself.

    layers: in the order of the forward pass. order: their numbers in the order in which backward delivers their
    gradients; by default from the last to the first. update: seconds of the optimizer's step over all parameters.
    element_bytes: of a gradient.
    """

    name: str
    layers: tuple[Layer, ...]
    update: float = 0.0
    order: tuple[int, ...] = ()
    element_bytes: int = 4

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"The profile of {self.name} has no layers: give one at least.")
        if any(layer.forward < 0 or layer.backward < 0 for layer in self.layers) or self.update < 0:
            raise ValueError(f"The profile of {self.name} has a negative time: times are seconds, 0 or more.")
        if self.order and sorted(self.order) != list(range(len(self.layers))):
            raise ValueError(f"order must name each of the {len(self.layers)} layers of {self.name} once.")

    @property
    def forward(self) -> float:
        return sum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> float:
        return sum(layer.backward for layer in self.layers)

    @property
    def compute(self) -> float:
        """A step without any communication: forward, backward and update."""
        return self.forward + self.backward + self.update

    @cached_property
    def elements(self) -> int:
        return sum(layer.elements for layer in self.layers)

    @property
    def bytes(self) -> int:
        return self.elements * self.element_bytes

    @property
    def backward_order(self) -> tuple[int, ...]:
        return self.order or tuple(reversed(range(len(self.layers))))

    def scaled(self, factor: float) -> Profile:
        """The same model on a device that takes ``factor`` times as long."""
        layers = tuple(
            dataclasses.replace(one, forward=one.forward * factor, backward=one.backward * factor)
            for one in self.layers
        )
        return dataclasses.replace(self, layers=layers, update=self.update * factor)


@dataclass(frozen=True)
class Piece:
    """A parameter: the number of its layer, its shape, its gradient's bytes."""

    layer: int
    shape: Shape
    bytes: int


@dataclass(frozen=True)
class Group:
    """Consecutive gradients that travel together."""

    pieces: tuple[Piece, ...]

    @cached_property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    @cached_property
    def layers(self) -> frozenset[int]:
        return frozenset(piece.layer for piece in self.pieces)


def buckets(profile: Profile, cap: float, first: float | None = None) -> list[Group]:
    """DDP's buckets: gradients in backward order, a bucket closed as soon as it holds ``cap`` bytes.

    first: the size of the first bucket, where it differs, as with DDP's own default.
    """
    made: list[Group] = []
    pieces: list[Piece] = []
    limit, total = cap if first is None else first, 0
    for piece in _pieces(profile):
        pieces.append(piece)
        total += piece.bytes
        if total >= limit:
            made.append(Group(tuple(pieces)))
            pieces, limit, total = [], cap, 0
    return [*made, Group(tuple(pieces))] if pieces else made


def fusion_groups(profile: Profile, cap: float) -> list[Group]:
    """The schedule's groups of about ``cap`` bytes, by the library's own rule."""
    fine = buckets(profile, _fusion.ddp_bucket_bytes(int(cap)))
    made, start = [], 0
    for count in _fusion.fuse([bucket.bytes for bucket in fine], int(cap)):
        made.append(Group(tuple(piece for bucket in fine[start : start + count] for piece in bucket.pieces)))
        start += count
    return made


def _pieces(profile: Profile) -> Iterator[Piece]:
    for number in profile.backward_order:
        for shape in reversed(profile.layers[number].shapes):
            yield Piece(number, shape, math.prod(shape) * profile.element_bytes)


def even(name: str, layers: int, elements: int, forward: float, backward: float, update: float = 0.0) -> Profile:
    """Equal layers of one vector each; the last has what is left over."""
    share = max(1, elements // layers)
    sizes = [share] * (layers - 1) + [elements - share * (layers - 1)]
    made = (Layer(f"layer {i}", ((size,),), forward / layers, backward / layers) for i, size in enumerate(sizes))
    return Profile(name, tuple(made), update)


def read(path: Path) -> Profile:
    """A profile that :func:`write` wrote. Raises ValueError, of one sentence."""
    try:
        found: dict[str, Any] = parsed(path.read_text(), is_json=True)
        layers = tuple(
            Layer(one["name"], tuple(map(_shape, one["shapes"])), float(one["forward"]), float(one["backward"]))
            for one in found.pop("layers")
        )
        order: Sequence[int] = found.pop("order", ())
        return Profile(layers=layers, order=tuple(order), **found)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a profile.") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no profile ({error}): write one with planner.profile.write().") from error


def _shape(sizes: Sequence[Any]) -> Shape:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"a shape is {sizes!r}")
    return tuple(sizes)


def write(profile: Profile, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(profile), indent=1) + "\n")
