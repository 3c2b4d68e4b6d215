"""Two levels: which ranks share a node, and lanes that move inside nodes first and between them second.

See Note [Two levels] in ``csrc/collectives/two_level.h``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from dear import _C
from dear._agree import everyones
from dear.collectives import Algorithm, make_lane

#: ``hierarchy=`` of :func:`dear.attach`.
Hierarchy = int | Literal["node"] | None


@dataclass(frozen=True)
class Nodes:
    """Ranks of a process group by node, every node of as many, in the order of their places inside it."""

    ranks: list[list[int]]
    rank: int  # this one's

    @property
    def index(self) -> int:
        """This rank's node."""
        return next(index for index, node in enumerate(self.ranks) if self.rank in node)

    @property
    def place(self) -> int:
        """This rank's place in its node."""
        return self.ranks[self.index].index(self.rank)

    @property
    def inside(self) -> list[int]:
        """The ranks of this node, by place."""
        return self.ranks[self.index]

    @property
    def between(self) -> list[int]:
        """The ranks of this place, by node."""
        return [node[self.place] for node in self.ranks]


def check_hierarchy(hierarchy: Any) -> None:
    """Refuses what is no hierarchy.

    Raises:
        ValueError: one sentence says what it must be.
    """
    if hierarchy is None or hierarchy == "node" or (type(hierarchy) is int and hierarchy > 0):
        return
    raise ValueError(f'hierarchy must be None, "node" or how many ranks a node has, not {hierarchy!r}.')


def find_nodes(group: dist.ProcessGroup, hierarchy: Hierarchy) -> Nodes | None:
    """The nodes of the group; None where one level does: a single node, or one rank in each. Collective; ``hierarchy``
    was checked, and is the same on every rank.

    A number says how many consecutive ranks a node has. ``"node"`` takes LOCAL_WORLD_SIZE, if the launcher numbered the
    ranks node by node, as torchrun does, and LOCAL_RANK says so on every rank; else it compares the hosts' names.

    Raises:
        ValueError: nodes have different numbers of ranks; on every rank.
    """
    if hierarchy is None:
        return None
    world = group.size()
    if isinstance(hierarchy, int):
        if world % hierarchy:
            raise ValueError(
                f"hierarchy={hierarchy} does not divide {world} ranks into nodes of as many: give a divisor."
            )
        found = _consecutive(world, hierarchy)
    else:
        found = _grouped(everyones(group, _what_is_known(os.environ), "which node each rank is on"))
    if len(found) == 1 or len(found[0]) == 1:
        return None
    return Nodes(found, group.rank())


def _what_is_known(env: Mapping[str, str]) -> tuple[str, str | None, str | None]:
    return socket.gethostname(), env.get("LOCAL_RANK"), env.get("LOCAL_WORLD_SIZE")


def _consecutive(world: int, size: int) -> list[list[int]]:
    return [list(range(begin, begin + size)) for begin in range(0, world, size)]


def _grouped(known: Sequence[tuple[str, str | None, str | None]]) -> list[list[int]]:
    """The ranks by node, of what each rank knows about itself."""
    world, size = len(known), known[0][2]
    if size is not None and size.isdigit() and int(size) > 0 and world % int(size) == 0:
        local = [(str(rank % int(size)), size) for rank in range(world)]
        if [(place, count) for _, place, count in known] == local:
            return _consecutive(world, int(size))
    by_host: dict[str, list[int]] = {}
    for rank, (host, _, _) in enumerate(known):
        by_host.setdefault(host, []).append(rank)
    found = list(by_host.values())
    sizes = sorted({len(node) for node in found})
    if len(sizes) > 1:
        raise ValueError(
            f'hierarchy="node" found nodes of {sizes[0]} to {sizes[-1]} ranks, and two levels need as many on each: '
            "start as many on every node, or leave hierarchy out."
        )
    return found


def timeout_after(stages: int, timeout: timedelta) -> timedelta:
    """How long a lane waits for a peer that can come to an exchange only after so many ``stages`` on lanes of other
    ranks. Who waits there for a rank that has stopped is to speak first; so is here, whatever the lane, who has got
    something of an exchange before those who have not, and wait an eighth longer: Note [Who speaks first] in
    ``csrc/collectives/host_lane.h``."""
    return timeout + stages * min(timeout / 32, timedelta(seconds=2.5))


def make_lane_by_levels(
    group: dist.ProcessGroup,
    name: str,
    algorithm: Algorithm,
    timeout: timedelta,
    nodes: Nodes | None,
    reduces: bool = False,
) -> _C.Lane:
    """:func:`dear.collectives.make_lane`, of two levels where there are nodes. Collective.

    reduces: it is meant for reduce-scatters, whose second level is the one between nodes, and not for all-gathers.
    """
    if nodes is None:
        return make_lane(group, name, algorithm, timeout)
    later = timeout_after(2, timeout)
    of_inside, of_between = (timeout, later) if reduces else (later, timeout)
    inside = make_lane(group, f"{name} in node", algorithm, of_inside, ranks=nodes.inside)
    between = make_lane(group, f"{name} between", algorithm, of_between, ranks=nodes.between)
    return _C.TwoLevelLane(inside, between, nodes.ranks)
