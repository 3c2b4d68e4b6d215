"""Nodes of several workers each: one port for all workers of a node, and no limit inside it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from .lab import Lab


class NodesLab(Lab):
    """A :class:`Lab` whose namespaces are nodes: `node_size` workers share one, ranks numbered node by node.

    `rate` limits the port of a node; what its workers say to each other goes over the namespace's own loopback.
    """

    name = "emulated network of nodes"
    about = "Network: emulated, one namespace per node, its port limited to the rate given, no limit inside it."

    def __init__(self, nodes: int, node_size: int, rate: str | float | None = None) -> None:
        if node_size < 1:
            raise ValueError(f"nodes of {node_size} workers are out of range: give at least 1")
        self.node_size = node_size
        super().__init__(nodes * node_size, rate, hosts=nodes)

    def node(self, rank: int) -> int:
        """On which node a rank is."""
        return rank // self.node_size

    def place(self, rank: int) -> AbstractContextManager[None]:
        return super().place(self.node(rank))

    def address(self, rank: int) -> str:
        return super().address(self.node(rank))

    def environment(self, rank: int) -> dict[str, str]:
        own = {"LOCAL_RANK": str(rank % self.node_size), "LOCAL_WORLD_SIZE": str(self.node_size)}
        return super().environment(rank) | own | {"NCCL_HOSTID": f"host {self.node(rank)}"}
