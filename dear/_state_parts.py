"""Optimizer state in parts, for checkpoints of which no rank holds all: what a rank has, and what it reads.

What a checkpoint has is read before the first backward pass has brought a layout. So each rank reads an equal run of
each parameter's elements, and the layout's owners get theirs when it is there, one bucket after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from dear import _C
from dear._layout import Layout, Place, Segment, stride_in_bucket
from dear._objects import all_gather_object
from dear._state import FullState, is_elementwise
from dear.collectives import shard_range

__all__ = ["InParts", "LoadedState", "StateParts"]

_LABEL = "the optimizer's state"

Run = tuple[int, torch.Tensor]  # where it begins in the parameter, as that lies in a bucket; its flat values


@dataclass
class StateParts:
    """What one rank has of the state, by parameter and key."""

    #: Of what has one value for each element.
    runs: dict[torch.Tensor, dict[str, list[Run]]] = field(default_factory=dict)
    #: Of everything else, and of parameters without elements.
    rest: dict[torch.Tensor, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, state: Mapping[torch.Tensor, dict[str, Any]], segments: Iterable[Segment], others: FullState
    ) -> StateParts:
        """Those of a state by segment. ``others``: of parameters that every rank has all of."""
        parts = cls()
        for segment in segments:
            for key, value in state.get(segment.tensor, {}).items():
                each = is_elementwise(key, value, segment.tensor)
                for place in segment.places:
                    if each and place.param.numel():
                        start = 0 if segment.whole else max(segment.start, place.start) - place.start
                        values = place.flatten(value) if segment.whole else segment.slot(place, value)
                        parts._add(place.param, key, (start, values))
                    else:
                        whole = value.new_empty(place.param.size()) if each else value
                        parts.rest.setdefault(place.param, {})[key] = whole
        for param, values_of in others.items():
            for key, value in values_of.items():
                if is_elementwise(key, value, param):
                    parts._add(param, key, (0, _flat(param, value)))
                else:
                    parts.rest.setdefault(param, {})[key] = value
        return parts

    def _add(self, param: torch.Tensor, key: str, run: Run) -> None:
        self.runs.setdefault(param, {}).setdefault(key, []).append(run)


@runtime_checkable
class InParts(Protocol):
    """An update strategy of which each rank has parts of the optimizers' state."""

    def state_parts(self) -> StateParts | None:
        """This rank's; None while every rank has all of it in ``optimizer.state``."""

    def load_state_parts(self, loaded: LoadedState) -> None:
        """Takes this rank's parts of a state. Collective."""


class LoadedState:
    """A checkpoint's state on its way to the owners: ``parts`` is filled by whoever reads it, one rank an equal run of
    each parameter.

    Args:
        kinds: by parameter, the keys and types of what has one value for each element; equal on every rank.
        alone: the parameters that every rank updates, so that each reads all of them.
        rank, world: of those who share.
    """

    def __init__(
        self, kinds: dict[torch.Tensor, dict[str, torch.dtype]], alone: set[torch.Tensor], rank: int, world: int
    ) -> None:
        self._kinds, self._alone = kinds, alone
        self.parts = StateParts()
        for param, keys in kinds.items():
            start, stop = (0, param.numel()) if param in alone else shard_range(param.numel(), world, rank)
            for key, dtype in keys.items():
                self.parts.runs.setdefault(param, {})[key] = [(start, torch.empty(stop - start, dtype=dtype))]

    def forget(self, params: Iterable[torch.Tensor]) -> None:
        """These have got another state since."""
        for param in params:
            for known in (self._kinds, self.parts.runs, self.parts.rest):
                known.pop(param, None)

    def whole(self, lane: _C.Lane) -> FullState:
        """The full state, on every rank. Collective."""
        params = list(self._kinds)
        mine = [(self.parts.runs.get(param, {}), self.parts.rest.get(param, {})) for param in params]
        full: FullState = {param: {} for param in params}
        flats = {
            param: {key: torch.empty(param.numel(), dtype=dtype) for key, dtype in keys.items()}
            for param, keys in self._kinds.items()
        }
        for one in all_gather_object(lane, mine, _LABEL, params[0].device if params else torch.device("cpu")):
            for param, (runs, rest) in zip(params, one, strict=True):
                full[param].update(rest)
                for key, parts in runs.items():
                    for start, values in parts:
                        flats[param][key][start : start + values.numel()] = values
        for param, keyed in flats.items():
            full[param].update({key: _like(param, flat) for key, flat in keyed.items()})
        return full

    def spread(self, layout: Layout, lane: _C.Lane) -> FullState:
        """The full state of the parameters that this rank owns elements of. Collective."""
        full: FullState = {}
        for param in self._alone:
            if param in self._kinds:
                runs = self.parts.runs.get(param, {})
                full[param] = self.parts.rest.pop(param, {}) | {
                    key: _like(param, values) for key, ((_, values),) in runs.items()
                }
        for bucket in range(len(layout.full)):
            here = [place for place in layout.in_bucket(bucket) if place.param in self._kinds]
            if here:
                self._spread_bucket(layout, lane, bucket, here, full)
        return full

    def _spread_bucket(self, layout: Layout, lane: _C.Lane, bucket: int, here: list[Place], full: FullState) -> None:
        buffer, owners = layout.full[bucket], layout.owners[bucket]
        ranges = owners.ranges(lane.rank) if owners.numel else [(0, 0)]
        mine = {place.param for begin, end in ranges for place in layout.between(bucket, begin, end)}
        rest = {index: self.parts.rest.pop(place.param, {}) for index, place in enumerate(here)}
        for one in all_gather_object(lane, rest, _LABEL, buffer.device):
            for index, values in one.items():
                if here[index].param in mine:
                    full.setdefault(here[index].param, {}).update(values)
        for key, dtype in sorted({kind for place in here for kind in self._kinds[place.param].items()}, key=str):
            places = [place for place in here if self._kinds[place.param].get(key) == dtype]
            flat = self._gather(lane, torch.zeros(buffer.numel(), dtype=dtype, device=buffer.device), places, key)
            for place in places:
                if place.param in mine:
                    full.setdefault(place.param, {})[key] = _like(place.param, flat[place.start : place.stop])
        for place in here:
            self.parts.runs.pop(place.param, None)

    def _gather(self, lane: _C.Lane, flat: torch.Tensor, places: list[Place], key: str) -> torch.Tensor:
        """``flat``, as a bucket, with the values of one key, of which each rank has read its part."""
        for place in places:
            for start, values in self.parts.runs[place.param].pop(key):
                flat[place.start + start : place.start + start + values.numel()] = values
        readers = _C.Ownership(flat.numel(), [_read_by(places, lane.world, rank) for rank in range(lane.world)])
        lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(flat, flat[:0])], _LABEL, [readers]).wait()
        return flat


def _read_by(places: Iterable[Place], world: int, rank: int) -> list[tuple[int, int]]:
    """What a rank has read of a bucket."""
    ranges: list[tuple[int, int]] = []
    for place in places:
        start, stop = (place.start + at for at in shard_range(place.param.numel(), world, rank))
        if ranges and ranges[-1][1] == start and start < stop:
            ranges[-1] = (ranges[-1][0], stop)
        elif start < stop:
            ranges.append((start, stop))
    return ranges


def _like(param: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """A copy in the parameter's shape of values as they lie in a bucket, on its device."""
    stride = stride_in_bucket(param)
    whole = torch.empty_strided(param.size(), stride, dtype=flat.dtype, device=param.device)
    return whole.copy_(flat.as_strided(param.size(), stride, flat.storage_offset()))


def _flat(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_like`."""
    flat = torch.empty(param.numel(), dtype=value.dtype, device=value.device)
    flat.as_strided(param.size(), stride_in_bucket(param)).copy_(value)
    return flat
