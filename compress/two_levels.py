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
from compress.group import Group
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
        places = {}
        for param, name in _ddp.parameter_names(model).items():
            if param.requires_grad:
                places[name] = loads.index(min(loads))
                loads[places[name]] += param.numel()
        return cls(nodes, places)

    def give_codec(self, compressor: Contract, group: Group, give: Callable[[Contract, Group], None]) -> None:
        """Gives the group a codec of two levels around that of this place's members, which ``give`` gives."""
        mine, start = [], 0
        for member in group.members:
            if self.places[member.name] == self.nodes.place:
                mine.append(dataclasses.replace(member, start=start))
                start += member.numel
        count = len(self.nodes.ranks)
        codec = _C.DenseCodec(group.device, self.nodes.index, count)  # of nothing
        compressor.feedback.world = count
        if mine:
            group.inner = Group(mine, group.dtype, group.device, self.nodes.index, count, group.label)
            give(compressor, group.inner)
            codec, group.feedback = group.inner.codec, group.inner.feedback
        ranges: list[list[tuple[int, int]]] = [[] for _ in self.nodes.inside]
        for member in group.members:
            if member.numel:
                ranges[self.places[member.name]].append((member.start, member.stop))
        owners = _C.Ownership(group.numel, ranges)
        group.codec = _C.TwoLevelCodec(group.device, codec, owners, self.nodes.place)


def check_two_levels(compressor: Contract) -> None:
    """Refuses a compressor that two levels cannot carry.

    Raises:
        ValueError: one sentence says why.
    """
    if compressor.exchanges != 2:
        raise ValueError(
            f"hierarchy carries compressors of two exchanges a step, and {type(compressor).__name__} makes "
            f"{compressor.exchanges}: leave hierarchy out, or take another compressor."
        )
