"""The two small exchanges of Eva and its like, in one lane."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dear import _C
from dear.collectives import Algorithm, shard_range


@dataclass(frozen=True)
class Average:
    """A flat tensor on its way to be averaged over the ranks: in place, or, where there are rows of all ranks, of
    those."""

    message: Tensor
    exchanges: list[_C.Exchange]
    rows: Tensor | None = None


class Exchanges:
    """What is exchanged with the other ranks. Every call is collective."""

    def __init__(self, lane: _C.Lane, algorithm: Algorithm) -> None:
        self._lane = lane
        # A ring ends one exchange before it begins the next. A backend settles what it has moved when it is waited for.
        self._in_order = algorithm == "ring"
        self.bytes_sent = 0  #: by this rank

    def average(self, message: Tensor) -> Average:
        """Submits a flat tensor to be averaged; it must not be touched before the average has come."""
        lane, label = self._lane, "the mean vectors"
        if lane.world == 2:  # each sends all of it once either way, and one exchange is quicker than two
            gathered, exchange = self._gather(message, label)
            return Average(message, [exchange], gathered)
        begin, end = shard_range(len(message), lane.world, lane.rank)
        following = shard_range(len(message), lane.world, (lane.rank + 1) % lane.world)
        parts = [(message, message[begin:end])]
        first = lane.submit(_C.Phase.reduce_scatter, _C.Reduction.average, parts, label)
        if not self._in_order:
            first.wait()  # of the current stream: the second half reads what the first one wrote
        # Round the ring go all chunks but this rank's own, and then all but the next rank's.
        sent = 2 * len(message) - (end - begin) - (following[1] - following[0])
        self.bytes_sent += sent * message.element_size()
        return Average(message, [first, lane.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label)])

    def wait(self, average: Average) -> Tensor:
        """The average, equal on all ranks to the bit."""
        for exchange in average.exchanges:
            exchange.wait()
        return average.message if average.rows is None else torch.mean(average.rows, 0, out=average.message)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks of a flat tensor that is small enough to be sent whole: one message and one wait.
        Equal on all ranks to the bit."""
        rows, exchange = self._gather(values, "what is asked of the gradients")
        exchange.wait()
        return torch.sum(rows, 0)

    def _gather(self, values: Tensor, label: str) -> tuple[Tensor, _C.Exchange]:
        """Every rank's flat tensor [world, n], once the exchange has ended."""
        lane = self._lane
        rows = values.new_empty(lane.world, len(values))
        rows[lane.rank] = values
        self.bytes_sent += (lane.world - 1) * values.nbytes
        return rows, lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(rows.view(-1), rows[lane.rank])], label)
