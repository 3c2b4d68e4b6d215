"""The examples of a step, and which worker of a cluster trains on how many of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .cluster import Cluster
from .profile import Profile
from .shares import shares, speeds, unevenness


@dataclass(frozen=True)
class Batch:
    """examples: of a step, of all workers. shares: by worker. activations: bytes that a worker keeps of one example.
    unevenness: how many times as long the last worker computes as it would if examples could be cut."""

    examples: int
    shares: tuple[int, ...]
    activations: float
    unevenness: float

    @classmethod
    def even(cls, cluster: Cluster, each: int, activations: float) -> Batch:
        """So many examples for each worker, on average: in proportion to their speeds."""
        examples = each * cluster.workers
        if not cluster.mixed:
            return cls(examples, (each,) * cluster.workers, activations, 1.0)
        fast = speeds(cluster.devices)
        return cls(examples, tuple(shares(examples, fast)), activations, unevenness(examples, fast))

    def uneven(self, profile: Profile) -> Profile:
        """The step of the worker that computes longest."""
        return dataclasses.replace(profile.scaled(self.unevenness), update=profile.update)
