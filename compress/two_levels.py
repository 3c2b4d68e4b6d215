"""A compressor between nodes alone: the mean inside each node first, and each parameter compressed by one rank
of a node.

Note [Parameters by place]
Every parameter belongs to one place of a node, whatever bucket it lies in: DDP rebuilds its buckets, and error feedback
stays where it is. Parameters are dealt out in order, each to the place that has least so far, so that every bucket is
shared by all places. Ranks of equal place, one in each node, compress what that place has among themselves, as a world
of as many ranks as there are nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.nn.parallel import DistributedDataParallel as DDP

from compress.contract import Contract
from compress.group import Group, Member
from compress.lanes import most_exchanges
from dear import _C, _ddp
from dear._nodes import Nodes


@dataclass(frozen=True)
class TwoLevels:
    """Nodes, and the place of each parameter. See Note [Parameters by place]."""

    nodes: Nodes
    places: Mapping[str, int]

    @classmethod
    def between(cls, nodes: Nodes | None, model: DDP) -> TwoLevels | None:
        """Deals out the model's parameters; None where there are no nodes."""
        if nodes is None:
            return None
        loads = [0] * len(nodes.inside)
        names, places = _ddp.parameter_names(model), {}
        for param in _ddp.reduced_parameters(model):  # frozen since or not: they are in DDP's buckets
            place = places[names[param]] = loads.index(min(loads))
            loads[place] += param.numel()
        return cls(nodes, places)

    def give_codec(
        self,
        compressor: Contract,
        group: Group,
        give: Callable[[Contract, Group], None],
        reader_of: Callable[[Contract, Group], _C.Codec | None],
    ) -> None:
        """Gives the group a codec of two levels around that of this place's members, which ``give`` gives;
        ``reader_of`` makes one that reads what another place sends, if that can be."""
        by_place: list[list[Member]] = [[] for _ in self.nodes.inside]
        ranges: list[list[tuple[int, int]]] = [[] for _ in self.nodes.inside]
        for member in group.members:
            place = self.places[member.name]
            start = by_place[place][-1].stop if by_place[place] else 0
            by_place[place].append(dataclasses.replace(member, start=start))
            if member.numel:
                ranges[place].append((member.start, member.stop))
        own, count = self.nodes.place, len(self.nodes.ranks)
        inner = [
            Group(members, group.dtype, group.device, self.nodes.index, count, group.label) if members else None
            for members in by_place
        ]
        codec = _C.DenseCodec(group.device, self.nodes.index, count)  # of nothing
        compressor.feedback.world = count
        group.inner = inner[own]
        if group.inner is not None:
            give(compressor, group.inner)
            codec = group.inner.codec
        readers = [
            None if each is None or place == own else reader_of(compressor, each) for place, each in enumerate(inner)
        ]
        group.feedback = [kept for each in inner if each is not None for kept in each.feedback]  # readers learn, too
        owners = _C.Ownership(group.numel, ranges)
        most = most_exchanges(compressor)
        group.codec = _C.TwoLevelCodec(group.device, codec, owners, own, readers, most)  # type: ignore[arg-type]  # None
