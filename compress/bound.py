"""A compression group in a bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.group import Group
from dear import _C


@dataclass
class Bound:
    """Where a group's members begin in a bucket, the bucket's flat buffer before and after, and what moves it."""

    group: Group
    exchange: _C.TwoPhaseExchange
    begins: list[int]
    source: Tensor
    target: Tensor

    def result(self, index: int) -> Tensor:
        """The flat result of the group's member of that number."""
        return self._part(self.target, index)

    def gradient(self) -> Tensor:
        """This rank's flat gradient, copied: now, or, where the exchange was asked to, before the result came."""
        kept = self.exchange.take_gradient()
        if kept is not None:
            return kept
        return torch.cat([self._part(self.source, index) for index in range(len(self.begins))])

    def aggregate(self) -> Tensor:
        """The flat result, copied."""
        return torch.cat([self.result(index) for index in range(len(self.begins))])

    def _part(self, flat: Tensor, index: int) -> Tensor:
        begin = self.begins[index]
        return flat[begin : begin + self.group.members[index].numel]
