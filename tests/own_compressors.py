"""Compressors of a user's own, one for each way a payload can travel."""

from typing import ClassVar, Literal

import torch

import compress


class RandomK(compress.Compressor):
    """Sends the same random elements on every rank: their values can be summed, their indices need not be sent."""

    def __init__(self, density: float, **options) -> None:
        super().__init__(**options)
        self.density = density

    def options(self):
        return {"density": self.density}

    def ratio(self, group):
        return 1 / self.density

    def encode(self, group):
        corrected, chosen = self.corrected(group), self._chosen(group)
        payload = corrected[chosen]
        corrected[chosen] = 0
        return payload

    def decode(self, group, payload):
        group.gradient.zero_()
        group.gradient[self._chosen(group)] = payload.to(group.dtype)

    def _chosen(self, group):
        generator = self.generator(f"{group.step} {group.names}")
        return torch.randperm(group.numel, generator=generator)[: max(1, int(self.density * group.numel))]


class Everything(compress.Compressor):
    """Sends all of every rank's gradient to all: nothing is summed on the way, and nothing is lost."""

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "gather"

    def ratio(self, group):
        return 1.0

    def encode(self, group):
        corrected = self.corrected(group)
        payload = group.buffer("payload", (group.numel,)).copy_(corrected)
        corrected.zero_()
        return payload

    def decode(self, group, payload):
        group.gradient.copy_(payload.mean(0))


class Owned(compress.Compressor):
    """Sends each owner all of its shard, and the owner their mean to all: nothing is lost."""

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"

    def ratio(self, group):
        return 1.0

    def encode(self, group):
        corrected = self.corrected(group)
        payload = group.buffer("payload", (group.world, self.shard_numel(group)))
        payload.view(-1)[: group.numel].copy_(corrected)
        corrected.zero_()
        return payload

    def merge(self, group, received):
        return received.mean(0)

    def decode(self, group, payload):
        group.gradient.copy_(payload.reshape(-1)[: group.numel])
