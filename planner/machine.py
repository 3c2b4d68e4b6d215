"""What a worker's machine does to a step beside computing: exchanges take cores, hooks and codecs take time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from .codecs import FREE, Codec, Cost

HOOK = 1e-4  # seconds of a bucket: a wake-up of a lane's thread and one of the thread that computes


@dataclass(frozen=True)
class Host:
    """Of a worker whose gradients are host tensors, so that exchanging takes what computing needs; as
    :class:`Machine` has them."""

    cores: float
    exchange_cpu: float
    hook: float = HOOK


@dataclass(frozen=True)
class Machine:
    """A worker's machine.

    cores: that a worker has, where computing and exchanging share them; None where they do not (a GPU with a network
    card that does its own work). exchange_cpu: seconds of a core for each byte a worker sends (and receives).
    hook: seconds that each bucket costs the thread which computes. costs: of codecs, by kind. jitter: standard
    deviation of a worker's computing, as a share of it. straggler: how many times as long the slowest worker
    computes as the profile says. synchronous: FSDP2's collectives block the thread that computes, as gloo's do.
    """

    cores: float | None = None
    exchange_cpu: float = 0.0
    hook: float = 0.0
    costs: Mapping[str, Cost] = field(default_factory=dict)
    jitter: float = 0.0
    straggler: float = 1.0
    synchronous: bool = False

    def cost(self, codec: Codec) -> Cost:
        """By the whole name, else by its kind; one that is not known costs nothing."""
        return self.costs.get(codec.name, self.costs.get(codec.name.partition(":")[0], FREE))

    def slowest(self, workers: int) -> float:
        """How many times as long the slowest of the workers computes: a step waits for it.

        The expected maximum of independent normal deviations, by Blom's approximation (Blom, 1958).
        """
        if workers < 2 or not self.jitter:
            return self.straggler
        return self.straggler * (1 + self.jitter * NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25)))
