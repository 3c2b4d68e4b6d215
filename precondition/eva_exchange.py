"""The two small exchanges of Eva and its like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dear import _C
from dear.collectives import shard_range


@dataclass(frozen=True)
class Average:
    """A flat tensor on its way to be averaged over the ranks, in place."""

    message: Tensor
    exchanges: list[_C.Exchange]

    def wait(self) -> Tensor:
        """The average, equal on all ranks to the bit."""
        for exchange in self.exchanges:
            exchange.wait()
        return self.message


def average(message: Tensor, lane: _C.Lane, label: str) -> Average:
    """Submits the flat tensor to be averaged. Collective; it must not be touched before the average has come."""
    begin, end = shard_range(len(message), lane.world, lane.rank)
    parts = [(message, message[begin:end])]
    first = lane.submit(_C.Phase.reduce_scatter, _C.Reduction.average, parts, label)
    if isinstance(lane, _C.NativeLane):
        first.wait()  # of the current stream: the second half reads what the first one wrote
    return Average(message, [first, lane.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label)])


def total(values: Tensor, lane: _C.Lane, label: str) -> Tensor:
    """The sum over the ranks of a flat tensor that is small enough to be sent whole: one message and one wait.
    Collective; equal on all ranks to the bit."""
    rows = values.new_empty(lane.world, len(values))
    rows[lane.rank] = values
    lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(rows.view(-1), rows[lane.rank])], label).wait()
    return torch.sum(rows, 0)
